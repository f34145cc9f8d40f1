"""Nouns every part shares: config, errors, rows, scores, run folders, files. No torch."""

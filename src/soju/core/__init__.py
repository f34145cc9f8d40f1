"""What every part shares: configuration, recipes, runs, errors, scores, hits, files. No torch."""

__version__ = "0.1.0"

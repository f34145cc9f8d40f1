"""Vocabulary expansion: difference → merges → initialise → certificate, and `expand`, which does all four."""

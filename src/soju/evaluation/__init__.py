"""Scores with signatures, significance and cost. Nothing here trains or reads a model."""

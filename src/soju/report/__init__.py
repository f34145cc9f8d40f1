"""Pages, plots and model cards from a run folder. Nothing here computes a score."""

"""Teacher models: text in, vectors or scores out, cached by content."""

"""Mode ``static``: a sparse encoder from word alignment, no network at all."""

"""Mode `static`: a sparse encoder from word alignment, without a neural network."""

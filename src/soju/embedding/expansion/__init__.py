"""Korean tokens for a byte-level BPE model: which, how they are merged in, where their rows start, and the proof."""

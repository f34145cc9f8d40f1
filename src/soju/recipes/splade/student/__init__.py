"""What the modes with a neural student share: where it starts, how it is trained, what is kept."""

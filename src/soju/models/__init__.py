"""Tokenizers and encoders: text in, weighted terms out."""

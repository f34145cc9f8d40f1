"""Inverted indexes and lexical search over them."""

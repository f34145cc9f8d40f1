"""Cross-lingual learned sparse retrieval: Korean text activates Korean and English terms."""

"""Cross-lingual learned sparse retrieval: Korean text lights up Korean and English terms."""

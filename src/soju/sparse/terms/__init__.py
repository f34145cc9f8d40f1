"""Mode `terms`: a neural student of a dense teacher, from terms and their translations."""

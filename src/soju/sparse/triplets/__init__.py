"""Mode `triplets`: a neural student from triplets of query, answer and hard negatives, in a curriculum."""

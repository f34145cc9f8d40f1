"""Recipe `embedding`: a Korean vocabulary, adapters and three training stages for an embedding model."""

"""The client's half of a model: embeddings, heads and training over a chain of blocks."""

"""The engine: images in, embeddings out, over worker processes."""

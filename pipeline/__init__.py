"""diffprune: which image-text pairs help a CLIP model, and the shards to train on those alone."""

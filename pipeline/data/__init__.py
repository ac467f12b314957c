"""From WebDataset shards to decoded pairs: finding, counting, reading, decoding, drawing, caching."""

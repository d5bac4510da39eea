"""WebDataset shards: packing, the index, verification."""

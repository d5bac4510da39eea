"""Images on disk to batches: formats in, shards between, a pure order and a stream out. Owns webdataset."""

"""From images on disk to batches: sources, shards, a pure order and a stream. Only this package imports webdataset."""

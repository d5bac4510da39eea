"""The benchmark's public datasets, as distributed by their authors -> evaluation sets and training shards."""

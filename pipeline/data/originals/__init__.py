"""The public datasets of the benchmark as their authors hand them out -> evaluation sets and training shards."""

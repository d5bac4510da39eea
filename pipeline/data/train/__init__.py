"""The stream of training batches."""

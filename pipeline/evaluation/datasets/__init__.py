"""The datasets of a benchmark: their table, their files, and which images of each are evaluated."""

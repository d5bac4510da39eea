"""Zero-shot classification and retrieval over a table of datasets, exact over ranks."""

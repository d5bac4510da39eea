"""The numbers of the paper and their rows in the report's tables."""

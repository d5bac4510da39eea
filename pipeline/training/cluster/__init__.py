"""Ranks, the nodes they run on, and the lease of a run's directory."""

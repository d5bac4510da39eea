"""Ranks, the nodes they run on, and who owns a run's directory."""

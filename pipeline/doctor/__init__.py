"""Checks of a machine, a launch and a benchmark, before anything expensive starts."""

"""Sweeps: a grid of configs, trained and evaluated on any number of nodes."""

"""Searches: a grid of configs, trained and evaluated one by one on any number of nodes."""

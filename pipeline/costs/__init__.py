"""Costs of blocks, training steps and trials: counted, traced and simulated."""

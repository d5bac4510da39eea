"""Training: from a config to checkpoints, under any launcher."""

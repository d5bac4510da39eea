"""The method: gated low-rank blocks, their penalty and the FLYP loss. Needs torch and nothing else."""

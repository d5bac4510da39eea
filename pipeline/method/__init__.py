"""The method: gated low-rank blocks, their penalty and the FLYP loss. Depends on torch only."""

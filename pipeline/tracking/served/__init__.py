"""The model that the registry serves."""

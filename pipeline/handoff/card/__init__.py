"""The model card of an export or a registered version: README.md and the figure in it."""

"""The files of runs and sweeps: where they are, what they hold, and which version wrote them (docs/formats.md)."""

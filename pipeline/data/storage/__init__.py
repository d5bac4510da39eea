"""Storage: local and remote folders, tar files, the machine's cache."""

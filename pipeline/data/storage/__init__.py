"""Where bytes come from: local and remote folders, tar files, the node's cache."""

"""Base weights in formats other than those of open_clip and timm."""

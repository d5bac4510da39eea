"""CLIP models and ViTs: loading, splitting and naming. The only package that imports open_clip and timm."""

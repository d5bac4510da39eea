"""CLIP models: loading, splitting and naming. The only row that imports open_clip."""

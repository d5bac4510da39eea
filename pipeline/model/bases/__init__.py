"""Base weights in other forms than open_clip's and timm's own."""

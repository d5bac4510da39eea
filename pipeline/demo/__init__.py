"""The demo: embedded images, a tiny CLIP, and the comparison of fine-tuning methods on them."""

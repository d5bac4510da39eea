"""Reference data of section keep: shipped sentences, a user's images, and their features from the untouched model."""

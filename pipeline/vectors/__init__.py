"""Unit vectors of images and texts: computed, kept in a file, searched, and used to look over a labelled set."""

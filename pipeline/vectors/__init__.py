"""Unit vectors of images and texts: computed, stored in a file, searched, and used to review a labelled set."""

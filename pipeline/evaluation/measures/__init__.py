"""What is computed from images and texts: features, classifiers, nearest neighbours, recall and counts."""

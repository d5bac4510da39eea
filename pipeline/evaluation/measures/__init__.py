"""Computations on images and texts: features, classifiers, nearest neighbours, recall and counts."""

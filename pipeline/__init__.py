"""selora: selective low-rank adaptation of CLIP, as a distributed pipeline."""

"""What leaves the pipeline: exports that other libraries load, and versions of a registered model."""

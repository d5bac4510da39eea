"""Delivery of the journal to MLflow, reading runs back, and the model registry."""

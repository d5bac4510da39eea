"""Evaluation sets and their batches."""

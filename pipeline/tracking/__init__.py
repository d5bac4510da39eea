"""The record of a run: a journal in its own directory first, and a copy in MLflow."""

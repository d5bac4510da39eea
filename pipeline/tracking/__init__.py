"""What a run leaves behind: a journal on its own disk first, MLflow second."""

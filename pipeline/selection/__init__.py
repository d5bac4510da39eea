"""Which of several models to take, and what a model must reach."""

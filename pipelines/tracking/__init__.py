"""A run in MLflow, in good and in bad days."""

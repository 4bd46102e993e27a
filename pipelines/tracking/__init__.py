"""Tracking in MLflow that survives crashes and lost servers."""

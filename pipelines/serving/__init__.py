"""Registered models: storage, loading and prediction."""

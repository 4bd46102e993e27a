"""Measurements, which are no tests: speed as a ratio against a peer in the same run, and quality on real data."""

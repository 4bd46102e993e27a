"""Measurements of speed, which are no tests: run them by hand, with `make bench`."""

"""Readers of annotation formats, one file each.

A reader ends in records or in a `DataError`, whatever a file holds. What is read in another way than it is written is
collected in `Notes`, to be told once.
"""

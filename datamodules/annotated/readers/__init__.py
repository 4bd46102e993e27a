"""Readers of annotation formats, one file each.

A reader returns records or raises a `DataError`, whatever a file contains. Deviations from the format are collected in
`Notes`, and reported once.
"""

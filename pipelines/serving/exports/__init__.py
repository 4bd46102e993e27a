"""Exportable networks, one class for each task: inference only, without the training parts."""

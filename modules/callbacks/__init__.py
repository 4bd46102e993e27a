"""Callbacks of a training: freezing, transfer learning, closed-form heads, logging."""

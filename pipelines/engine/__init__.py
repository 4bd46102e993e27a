"""The machinery behind the tasks' command lines."""

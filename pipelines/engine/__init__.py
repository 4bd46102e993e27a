"""The machine behind a task's command line."""

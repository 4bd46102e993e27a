"""Complete tasks to read and to start from."""

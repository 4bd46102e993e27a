"""What a registered model is, and how it answers."""

"""What happens around a training: freezing, transfer, heads that are solved for."""

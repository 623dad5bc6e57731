"""What a run will need, and which configuration to choose."""

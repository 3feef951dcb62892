"""The names that other tools give to what our options do. Torch-free."""

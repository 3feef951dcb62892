"""Linear layers of frozen models in 4 or 8 bits."""

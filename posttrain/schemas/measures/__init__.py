"""Schemas of the forms of `gemma2 eval`."""

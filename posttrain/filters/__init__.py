"""Filters on training data: each is a small function from a row to the reason for dropping it, or None."""

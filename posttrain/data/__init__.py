"""Rows of data: where they come from, what they must hold, how conversations become tokens and batches."""

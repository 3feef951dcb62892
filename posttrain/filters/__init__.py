"""Filters on data to learn from: one file per filter, each a small function from a row to what is wrong with it."""

"""Merge methods: the table of all of them, their options, and the coefficients that each computes."""

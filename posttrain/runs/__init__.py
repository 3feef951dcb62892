"""Runs: the run directory, its provenance, its inputs, the command table and the estimates."""

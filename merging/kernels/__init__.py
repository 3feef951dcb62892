"""Compiled arithmetic on tensors (numba, without the GIL), and number formats."""

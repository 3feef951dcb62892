"""Compiled arithmetic on tensors (numba, without the GIL), and number formats.

The scalars that numba infers are annotated with the type that compiled code has for them.
"""

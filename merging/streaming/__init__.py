"""Streams the tensors of a plan through the kernels to the output."""

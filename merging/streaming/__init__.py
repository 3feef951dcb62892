"""Streams the tensors of a plan through the kernels into the output."""

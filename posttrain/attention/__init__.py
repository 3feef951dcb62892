"""Attention kernels: which one a model gets, and a check of it against eager attention."""

"""Outputs on other disks and in object stores: `gemma2 push` and `gemma2 pull`, over fsspec."""

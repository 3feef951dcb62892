"""Outputs on disk: directories that appear whole or not at all, manifests, digests, model cards, headers."""

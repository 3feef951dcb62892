"""Outputs on disk: directories that appear complete or not at all, manifests, digests, model cards, headers."""

"""Merges in YAML files, in our keys or in mergekit's, and the run of their steps."""

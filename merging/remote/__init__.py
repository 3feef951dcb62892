"""Models that are merged while their weights still arrive from the hub."""

"""Preference pairs, and the reward models that are learned from them."""

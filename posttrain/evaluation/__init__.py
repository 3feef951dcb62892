"""Reward and KL of policies on held-out prompts, and the front of many."""

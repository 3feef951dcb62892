"""Rewards of completions: reward models, Python functions, and their weighted sum."""

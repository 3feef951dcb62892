"""The reward of a completion: reward models, functions, and their sum."""

"""Inputs of a merge: checkpoints, LoRA adapters, and whether they can be merged with each other."""

"""Inputs of a merge: checkpoints, LoRA adapters, and the checks that they can be merged with each other."""

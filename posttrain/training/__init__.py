"""Supervised training on TRL: the shared trainer frame, SFT."""

"""Measures that need no extra: perplexity, answers, choices, win rates."""

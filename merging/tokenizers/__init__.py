"""Tokenizers that differ: the vocabulary of the output, and the row of each token in each model."""

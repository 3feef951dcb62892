"""The contents of a model directory, and the difference between two models."""

"""Reports on the contents of a model directory and on the difference of two models."""

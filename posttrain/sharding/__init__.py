"""Weights, gradients, moments and anchors divided over processes by FSDP2; their checkpoints and outputs."""

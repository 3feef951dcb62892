"""Foundations of every layer: errors, progress, YAML and JSON files, the processes of a job, outputs on disk.

No numpy, no torch.
"""

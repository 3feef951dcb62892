"""Executors of stages: processes of this machine, or tasks of a Ray cluster."""

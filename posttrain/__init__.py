"""The training steps, data, evaluation and pipelines. Nothing is imported here: every step is a separate module."""

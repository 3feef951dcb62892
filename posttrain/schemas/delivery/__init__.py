"""Schemas of the commands that hand a model on: `gemma2 export`, `serve`, `push`, `pull`."""

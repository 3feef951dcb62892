"""The conversation of `gemma2 chat` in a terminal: what is typed, what is shown."""

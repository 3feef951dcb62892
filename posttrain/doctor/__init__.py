"""Is a model what it should be, can this machine run it: every check of `gemma2 doctor`, and what it can put right."""

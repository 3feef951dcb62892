"""`gemma2 recipes` and `gemma2 config`: recipes by machine, checks of settings files, their schemas."""

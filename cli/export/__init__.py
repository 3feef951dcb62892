"""`gemma2 export` and `gemma2 serve`."""

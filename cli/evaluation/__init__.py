"""`gemma2 eval`: its forms, and what each prints."""

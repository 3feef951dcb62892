"""`gemma2 chat`: one or two models answer turn by turn, with the KV cache kept."""

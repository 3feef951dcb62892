"""What is checked before a command loads anything: rows, kinds of models, tokenizers, trainer options, functions."""

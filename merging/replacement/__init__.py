"""Another tokenizer for a model: rows of its embedding and head for the new tokens, from the rows of the old ones."""

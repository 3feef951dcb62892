"""Results next to others: published rows, paired differences, the model card's rows."""

"""A loaded model against what its directory says: its tensors and options, and what one forward pass gives."""

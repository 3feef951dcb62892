"""What a completion is worth: reward models, functions, and their sum."""

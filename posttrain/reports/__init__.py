"""What a finished run looks like: figures, the front in characters, and the one-page report."""

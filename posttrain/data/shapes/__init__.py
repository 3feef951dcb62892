"""The shapes that rows have in other people's files, and what each becomes."""

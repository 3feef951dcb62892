"""Back ends that answer prompts: one small interface, the same rows whichever is behind it."""

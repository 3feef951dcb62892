"""The embedded models and their exercises: a small world to run the whole path in."""

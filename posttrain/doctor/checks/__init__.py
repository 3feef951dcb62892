"""One file per group of checks."""

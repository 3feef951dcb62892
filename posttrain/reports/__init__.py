"""Reports on runs: figures, the front in characters, lineages, and the one-page HTML report."""

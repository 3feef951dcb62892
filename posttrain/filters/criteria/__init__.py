"""One file per filter: what is wrong with a row, or with a row next to others."""

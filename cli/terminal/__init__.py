"""The terminal: console, bars and tables, help pages, flags from schemas."""

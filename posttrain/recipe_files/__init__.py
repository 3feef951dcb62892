"""Settings files before a command reads them: their kind, every fault of theirs, their JSON Schema, recipes by machine."""

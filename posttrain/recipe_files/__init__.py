"""Settings files before a command reads them: every fault, their JSON Schema, recipes by machine."""

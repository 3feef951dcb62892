"""YAML files of other tools as recipes of ours. Torch-free."""

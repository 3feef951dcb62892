"""Low-rank adapters from models: the difference of a model and its base as the factors of LoRA."""

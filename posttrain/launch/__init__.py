"""Several processes for one command: which GPUs and machines, who starts whom, how they end. Torch-free to import."""

"""Models: loading, import, adapters, and the forward passes that sample and score."""

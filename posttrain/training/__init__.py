"""Training with TRL, for every step: trainer arguments, callbacks, held-out losses, trackers."""

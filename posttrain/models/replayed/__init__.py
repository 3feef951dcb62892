"""One step of decoding on tensors that keep their places: what a CUDA graph replays. No module here knows a model."""

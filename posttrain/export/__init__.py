"""An output as others take it: dtype, shards, GGUF, the hub, endpoints, servers."""

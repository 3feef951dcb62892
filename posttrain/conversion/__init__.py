"""`gemma2 convert`: models from GGUF files and other directories, as plain safetensors."""

"""What files of others may not do: choose code, lead elsewhere. Bounds of their size are in `core/limits.py`."""

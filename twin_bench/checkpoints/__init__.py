"""Checkpoints on disk and on the hub. Tensors are read lazily, and files are written whole."""

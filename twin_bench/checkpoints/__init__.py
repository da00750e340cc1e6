"""Checkpoints on disk and on the hub: read lazily, written whole."""

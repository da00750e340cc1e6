"""Merge methods: task vectors, the registry, and what merging needs."""

"""Routers: what gives each expert a weight for an input. One file a kind, found by the registry."""

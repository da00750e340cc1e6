"""Routers: what gives each expert a weight for an input. One file for each kind is in `kinds/`."""

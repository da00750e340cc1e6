"""The twin: exclusive vectors, router, fusion, the model that joins them, and its directory on disk."""

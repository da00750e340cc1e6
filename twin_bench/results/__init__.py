"""Results: what a run leaves on disk, and what is computed of it. No model is needed to read them."""

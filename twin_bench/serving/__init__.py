"""How a harness asks a twin of language models: prompts, settings, and the engine that answers many threads at once."""

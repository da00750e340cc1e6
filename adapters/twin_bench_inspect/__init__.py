"""twin-bench's plugin for Inspect AI: `inspect eval TASK --model twin_merged/MY_TWIN`.

Importing this package imports neither Inspect nor torch.
"""

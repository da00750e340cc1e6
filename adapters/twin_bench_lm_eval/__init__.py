"""twin-bench's plugin for lm-evaluation-harness: `lm_eval --model twin_merged`.

Importing this package imports neither lm_eval nor torch: an interpreter's start goes through it.
"""

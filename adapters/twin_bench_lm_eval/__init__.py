"""twin-bench's plugin for lm-evaluation-harness: `lm_eval --model twin_merged`.

Importing this package imports neither lm_eval nor torch, because every start of an interpreter imports it.
"""

"""The upper bound: every task by its own fine-tuned model."""

from twin_bench.merging.registry import unmerged_method

unmerged_method("experts", title="Individual experts", paper="", track="bound")

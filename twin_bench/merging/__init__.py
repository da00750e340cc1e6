"""Merge methods: task vectors, the registry of methods, and what merging to a checkpoint needs.

A file that adds a method begins with `from twin_bench.merging import TaskVectors, merge_method`.
"""

from twin_bench.merging.by_name import merge
from twin_bench.merging.registry import Method, find_method, merge_method, methods, served_method
from twin_bench.merging.task_vectors import TaskVectors

__all__ = ["Method", "TaskVectors", "find_method", "merge", "merge_method", "methods", "served_method"]

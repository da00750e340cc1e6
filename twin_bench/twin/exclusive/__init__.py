"""Exclusive vectors: what an expert keeps beside the shared expert. One file for each kind is in `kinds/`.

`exclusive_vector` computes an expert's. `Exclusive` holds it.
"""

from twin_bench.twin.exclusive.registry import ExclusiveKind, exclusive_kind, find_kind, known_kinds
from twin_bench.twin.exclusive.vector import Exclusive, exclusive_vector

__all__ = ["Exclusive", "ExclusiveKind", "exclusive_kind", "exclusive_vector", "find_kind", "known_kinds"]

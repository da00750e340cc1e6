"""twin-bench: twin-merged models inside evaluation harnesses, and a leaderboard of merge methods.

`merge` and `methods` are the merge methods, `TwinModel` the model that fuses experts per input.
"""

from twin_bench.errors import InputError
from twin_bench.merging.registry import merge, methods
from twin_bench.twin.model import TwinModel

__all__ = ["InputError", "TwinModel", "merge", "methods"]

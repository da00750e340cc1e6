"""Layers with exclusive vectors: the modules that replace a model's own, one file for each kind.

`install` replaces the layers of a model. `TWINS` (in `kinds.py`) lists the kinds.
"""

from twin_bench.twin.layers.base import TwinLayer, by_row
from twin_bench.twin.layers.embedding import TiedEmbedding, TiedLinear, TwinEmbedding
from twin_bench.twin.layers.kinds import TWINS, install
from twin_bench.twin.layers.linear import TwinConv1D, TwinLinear
from twin_bench.twin.layers.norm import TwinLayerNorm, TwinRMSNorm
from twin_bench.twin.layers.positions import TwinLearnedPositions, TwinRelativeBias
from twin_bench.twin.layers.together import Together, find_together

__all__ = [
    "TWINS",
    "TiedEmbedding",
    "TiedLinear",
    "Together",
    "TwinConv1D",
    "TwinEmbedding",
    "TwinLayer",
    "TwinLayerNorm",
    "TwinLearnedPositions",
    "TwinLinear",
    "TwinRMSNorm",
    "TwinRelativeBias",
    "by_row",
    "find_together",
    "install",
]

"""Random entries of each matrix's difference, rescaled."""

from __future__ import annotations

from twin_bench.merging.drawing import draws
from twin_bench.twin.exclusive.forms import Exclusive, ExpertDifferences
from twin_bench.twin.exclusive.kinds.magnitude import require_density
from twin_bench.twin.exclusive.registry import exclusive_kind
from twin_bench.twin.exclusive.sparse import Sparse


@exclusive_kind(title="Random entries", paper="arXiv:2311.03099", draws=True)
def bernoulli(differences: ExpertDifferences, *, density: float) -> Exclusive:
    """Each entry of a matrix with probability `density`, divided by `density`, stored with its position.

    The draws depend on the seed, the expert's name and the parameter's name alone.
    """
    require_density("bernoulli", density)
    kept: dict[str, Sparse] = {}
    for name, matrix in differences.matrices():
        drawn = draws(differences.seed, differences.expert, name, matrix.shape).to(matrix.device)
        kept[name] = Sparse.of(matrix / density, (drawn < density) & (matrix != 0))
    return Exclusive({}, differences.vectors, {name: one for name, one in kept.items() if one.count})

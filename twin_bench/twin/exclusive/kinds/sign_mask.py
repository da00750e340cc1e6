"""One bit for each entry of a matrix's difference, and one size for all of them."""

from __future__ import annotations

from twin_bench.twin.exclusive.forms import Exclusive, ExpertDifferences
from twin_bench.twin.exclusive.kinds.magnitude import largest, require_density
from twin_bench.twin.exclusive.registry import exclusive_kind
from twin_bench.twin.exclusive.sparse import Sparse


@exclusive_kind(title="Signs and a scale", paper="arXiv:2412.00054")
def sign_mask(differences: ExpertDifferences, *, density: float = 1.0) -> Exclusive:
    """Of each matrix, sign(delta) * mean |delta| over the int(density * m n) largest entries, one bit an entry.

    Below density 1 the positions of the entries are stored as well, as T-Switch does. Entries equal to 0 have no sign
    and are left out. Of all matrices of these signs, the mean is the size that is nearest to the difference.
    """
    require_density("sign_mask", density)
    kept: dict[str, Sparse] = {}
    for name, matrix in differences.matrices():
        chosen = largest(matrix, density)
        if chosen.any():
            kept[name] = Sparse.of(matrix, chosen, scale=matrix[chosen].abs().double().mean().to(matrix))
    return Exclusive({}, differences.vectors, kept)

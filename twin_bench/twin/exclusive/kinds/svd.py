"""The truncated SVD of each matrix's difference, at a rank of its own."""

from __future__ import annotations

import logging
from collections.abc import Mapping

import torch
from torch import Tensor

from twin_bench.checkpoints.factors import Factors
from twin_bench.errors import InputError
from twin_bench.twin.exclusive.budget import direction_cost, require_budget
from twin_bench.twin.exclusive.forms import Exclusive, ExpertDifferences
from twin_bench.twin.exclusive.quantised import quantised
from twin_bench.twin.exclusive.registry import exclusive_kind

_log = logging.getLogger(__name__)


@exclusive_kind(title="Truncated SVD", paper="arXiv:2406.15479")
def svd(
    differences: ExpertDifferences,
    *,
    density: float | None = None,
    rank: int | None = None,
    energy: float | None = None,
    budget: float | None = None,
    budget_bytes: int | None = None,
    bits: int | None = None,
) -> Exclusive:
    """SVD_r(theta_t - theta_s) of each matrix, stored as factors B = U sqrt(S) and A = sqrt(S) V^T.

    One of these decides the ranks r:

    - `density`: int(density * min(m, n));
    - `rank`: at most this rank;
    - `energy`: for each matrix the smallest rank that holds this share of its squared singular values;
    - `budget`, a share of a whole expert's bytes, or `budget_bytes`: the directions of all matrices that hold the most
      squared singular value for each stored byte, as many as the bytes allow. Vectors and scales count, too.

    `bits` 8 or 4 stores the factors quantised, and the twin computes with what the codes stand for.

    With -v, each expert's error is measured on the whole matrices and logged.

    Raises InputError unless one of them is given and in range, if the budget holds not even one direction, or if an SVD
    fails.
    """
    given = (density, rank, energy, budget, budget_bytes)
    if sum(value is not None for value in given) != 1:
        raise InputError("exclusive: give either density or rank, or a budget")
    if budget is not None:
        budget_bytes = _share_of(differences, budget)
    if budget_bytes is not None:
        factors = _within_budget(differences, budget_bytes, bits)
    elif energy is not None:
        full = ((name, matrix, min(matrix.shape)) for name, matrix in differences.matrices())
        factors = {
            name: _of_energy(_truncated(differences, name, most, matrix), matrix, energy) for name, matrix, most in full
        }
    else:
        factors = {
            name: _truncated(differences, name, exclusive_rank(shape, density=density, rank=rank))
            for name, shape in differences.shapes.items()
        }
    factors = {name: pair for name, pair in factors.items() if len(pair.A)}
    codes = {} if bits is None else {name: quantised(pair, bits) for name, pair in factors.items()}
    factors = factors if bits is None else {name: code.factors() for name, code in codes.items()}
    if _log.isEnabledFor(logging.INFO):
        _log.info("expert %s: the factors leave out %s", differences.expert, _left_out(differences, factors))
    return Exclusive(factors, differences.vectors, quantised=codes)


def exclusive_rank(shape: torch.Size, *, density: float | None = None, rank: int | None = None) -> int:
    """Return the rank to which an (m, n) matrix is truncated: int(density * min(m, n)), or min(rank, m, n).

    As in the paper, a density can give rank 0 (0.1 for a 2 x 768 token-type embedding). Then nothing of the matrix's
    difference is kept. InputError unless exactly one of `density` and `rank` is given and is in range.
    """
    if (density is None) == (rank is None):
        raise InputError("exclusive: give either density or rank")
    if density is not None:
        if not 0 < density <= 1:
            raise InputError(f"exclusive: density must be in (0, 1], not {density}")
        return int(density * min(shape))
    assert rank is not None
    if rank < 1:
        raise InputError(f"exclusive: rank must be at least 1, not {rank}")
    return min(rank, *shape)


def directions_within(spectra: Mapping[str, Tensor], costs: Mapping[str, int], budget: int) -> dict[str, int]:
    """Return how many directions of each matrix are stored in `budget` bytes: the best by S^2 for each byte.

    Args:
        spectra: each matrix's singular values (k,), descending.
        costs: the bytes of one direction of each matrix.
        budget: the bytes for all directions.
    """
    ranked = sorted(
        ((float(value) ** 2 / costs[name], name) for name, S in spectra.items() for value in S),
        key=lambda one: (-one[0], one[1]),
    )
    counts, left = dict.fromkeys(spectra, 0), budget
    for _, name in ranked:
        if costs[name] <= left:  # if not, no later direction of this matrix fits either
            counts[name] += 1
            left -= costs[name]
    return counts


def _truncated(differences: ExpertDifferences, name: str, rank: int, made: Tensor | None = None) -> Factors:
    """Return the factors of the truncated SVD of a matrix's difference on the CPU, of rank 0 where nothing differs.

    The difference is computed where neither it is `made` nor its factors are kept. InputError that names the tensor if
    the SVD fails.
    """

    def compute() -> Mapping[str, Tensor]:
        matrix = differences.matrix(name) if made is None else made
        if matrix is None or not rank:
            m, n = differences.shapes[name]
            return {"B": torch.zeros(m, 0), "A": torch.zeros(0, n)}
        try:
            B, A = differences.svd(matrix, rank)
        except torch.linalg.LinAlgError as error:  # type: ignore[attr-defined]
            raise InputError(f"tensor {name}: the SVD of its difference fails ({error}); correct the expert") from None
        return {"B": B.cpu(), "A": A.cpu()}

    kept = differences.keep(("svd", differences.expert, name, str(rank)), differences.shapes[name].numel(), compute)
    return Factors(kept["B"], kept["A"])


def _left_out(differences: ExpertDifferences, factors: Mapping[str, Factors]) -> str:
    """Return in words the Frobenius norm of what the factors lack, in shares of the differences' norm."""
    lacking: dict[str, float] = {}
    sizes: dict[str, float] = {}
    for name, matrix in differences.matrices():
        sizes[name] = float(matrix.double().square().sum())
        if name in factors:
            B, A = (side.to(matrix) for side in factors[name])
            matrix = torch.addmm(matrix, B, A, alpha=-1)
        lacking[name] = float(matrix.double().square().sum())
    if not sizes:
        return "nothing"
    worst = max(sizes, key=lambda name: lacking[name] / sizes[name])
    share, most = (sum(lacking.values()) / sum(sizes.values())) ** 0.5, (lacking[worst] / sizes[worst]) ** 0.5
    return f"{share:.2g} of the norm of all differences, and at most {most:.2g} of a matrix's ({worst})"


def _singular_values(factors: Factors) -> Tensor:
    """Return S (r,) in float64, of factors whose A is sqrt(S) V^T."""
    return factors.A.double().square().sum(dim=1)


def _cut(factors: Factors, rank: int) -> Factors:
    return Factors(factors.B[:, :rank].contiguous(), factors.A[:rank].contiguous())


def _of_energy(factors: Factors, matrix: Tensor, energy: float) -> Factors:
    if not 0 < energy <= 1:
        raise InputError(f"exclusive: rank.energy must be in (0, 1], not {energy}")
    held = _singular_values(factors).square().cumsum(dim=0)
    return _cut(factors, int((held < energy * float(matrix.double().square().sum())).sum()) + 1)


def _share_of(differences: ExpertDifferences, budget: float) -> int:
    if not 0 < budget <= 1:
        raise InputError(
            f"exclusive: budget must be in (0, 1], a share of an expert's bytes, or bytes: N; not {budget}"
        )
    return int(budget * differences.model_bytes)


def _within_budget(differences: ExpertDifferences, budget: int, bits: int | None) -> dict[str, Factors]:
    taken = sum(vector.nbytes for vector in differences.vectors.values())
    left = budget - taken
    whole: dict[str, Factors] = {}
    costs: dict[str, int] = {}
    for name, matrix in differences.matrices():
        m, n = matrix.shape
        costs[name] = direction_cost((m, n), matrix.dtype, bits)
        whole[name] = _truncated(differences, name, min(m, n, max(0, left) // costs[name]), matrix)
    require_budget(budget, differences.expert, taken, costs)
    counts = directions_within({name: _singular_values(pair) for name, pair in whole.items()}, costs, left)
    return {name: _cut(pair, counts[name]) for name, pair in whole.items()}

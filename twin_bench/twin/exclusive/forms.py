"""What an exclusive vector is made of, and what a kind makes it from."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from twin_bench.checkpoints.factors import Factors
from twin_bench.twin.exclusive.quantised import QuantisedFactors
from twin_bench.twin.exclusive.sparse import Sparse

Compute = Callable[[], Mapping[str, Tensor]]
Keep = Callable[[tuple[str, ...], int, Compute], Mapping[str, Tensor]]
"""A function (key, entries, compute) -> tensors, which are computed unless they are kept under the key.

`entries` is the size of the parameter that they are computed from: see `twin_bench.twin.work`.
"""


def keep_nothing(key: tuple[str, ...], entries: int, compute: Compute) -> Mapping[str, Tensor]:
    """Return what is computed."""
    return compute()


@dataclass(frozen=True)
class Exclusive:
    """One expert's exclusive vector, by parameter name.

    `factors` holds low-rank differences of matrices, `sparse` those of which single entries are kept, and `vectors`
    those of 1-D tensors. `quantised` holds the codes of `factors` where they are stored with few bits. The factors are
    then what the codes stand for.
    """

    factors: Mapping[str, Factors]
    vectors: Mapping[str, Tensor]
    sparse: Mapping[str, Sparse] = field(default_factory=dict)
    quantised: Mapping[str, QuantisedFactors] = field(default_factory=dict)

    def names(self) -> tuple[str, ...]:
        """Return the names of the parameters that the expert changes."""
        return (*self.factors, *self.sparse, *self.vectors)

    def numbers(self) -> int:
        """Return how many numbers are stored, whatever their bits. Positions of entries and scales do not count."""
        factors = sum(B.numel() + A.numel() for B, A in self.factors.values())
        return factors + sum(one.count for one in self.sparse.values()) + sum(v.numel() for v in self.vectors.values())

    def nbytes(self) -> int:
        """Return the bytes of all that is stored: numbers, positions and scales."""
        low_rank = {**self.factors, **{name: tuple(one.parts.values()) for name, one in self.quantised.items()}}
        entries = (one.parts.values() for one in self.sparse.values())
        tensors = (tensor for parts in (*low_rank.values(), *entries, self.vectors.values()) for tensor in parts)
        return sum(tensor.nbytes for tensor in tensors)


@dataclass(frozen=True)
class ExpertDifferences:
    """One expert's differences theta_t - theta_s from the shared expert, from which a kind makes an exclusive vector.

    `shapes` are those of the matrices that may differ. `matrix(name)` computes the difference (m, n) of one, and None
    where the parameters are equal. It is on the device of the build; what a kind keeps of it is on the CPU. `vectors`
    are the differences of 1-D tensors, without equal ones. All are in float32, or in float64 for float64 parameters.
    `svd(matrix, rank)` returns the best approximation of a matrix of that rank, as
    `twin_bench.merging.linear_algebra.truncated_svd` does. `expert` is the expert's name, which draws depend on besides
    `seed`. `model_bytes` is the size of a whole expert without its head. `keep` is asked for what takes long to
    compute.
    """

    expert: str
    seed: int
    model_bytes: int
    vectors: Mapping[str, Tensor]
    shapes: Mapping[str, torch.Size]
    matrix: Callable[[str], Tensor | None]
    svd: Callable[[Tensor, int], Factors]
    keep: Keep = keep_nothing

    def matrices(self) -> Iterator[tuple[str, Tensor]]:
        """Yield each matrix's name and difference, and compute one after the other. Equal ones are left out."""
        for name in self.shapes:
            matrix = self.matrix(name)
            if matrix is not None:
                yield name, matrix

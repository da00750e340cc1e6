"""Random exclusive vectors of the size of an expert's own: a control that shows what any change of that size does."""

from __future__ import annotations

import torch
from torch import Tensor

from twin_bench.checkpoints.factors import Factors
from twin_bench.merging.drawing import generator_of
from twin_bench.twin.exclusive import Exclusive


def random_like(exclusive: Exclusive, expert: str, *, seed: int) -> Exclusive:
    """Return an exclusive vector with random directions and the sizes of the given one.

    A matrix's factors become B = U sqrt(S) and A = sqrt(S) V^T, where S are the singular values of their product. U and
    V have random orthonormal columns, so the product has the same Frobenius norm and rank. A 1-D tensor becomes a
    normal draw of the same norm. Shapes and dtypes stay.

    What is drawn depends on the seed, the expert's name and the parameter's name alone.

    Args:
        exclusive: the expert's own exclusive vector.
        expert: the expert's name.
        seed: the seed of the draws.
    """
    factors = {name: _random_factors(pair, seed, expert, name) for name, pair in exclusive.factors.items()}
    vectors = {name: _random_vector(own, seed, expert, name) for name, own in exclusive.vectors.items()}
    return Exclusive(factors, vectors)


def _random_factors(pair: Factors, seed: int, expert: str, name: str) -> Factors:
    B, A = pair.B.double(), pair.A.double()
    # B A = Q_B (R_B R_A^T) Q_A^T, so the small matrix in the middle has the singular values of the product.
    S = torch.linalg.svdvals(torch.linalg.qr(B).R @ torch.linalg.qr(A.T).R.T)
    U = _orthonormal(B.shape, generator_of(seed, expert, name, "U"))
    V = _orthonormal(A.T.shape, generator_of(seed, expert, name, "V"))
    root = S.sqrt()
    return Factors((U * root).to(pair.B), (V * root).T.contiguous().to(pair.A))


def _orthonormal(shape: torch.Size, generator: torch.Generator) -> Tensor:
    """Return a random (n, r) matrix in float64 whose columns are orthonormal, n >= r, drawn uniformly."""
    Q, R = torch.linalg.qr(torch.randn(shape, generator=generator, dtype=torch.float64))
    return Q * R.diagonal().sign()  # QR leaves the signs to the library, and they decide the distribution


def _random_vector(vector: Tensor, seed: int, expert: str, name: str) -> Tensor:
    drawn = torch.randn(vector.shape, generator=generator_of(seed, expert, name), dtype=torch.float64)
    return (drawn * (vector.double().norm() / drawn.norm())).to(vector)

"""Layers that keep the experts' factors of a matrix, or the joint basis of these factors."""

from __future__ import annotations

import torch
from torch import Tensor

from twin_bench.twin.basis import JointBasis, find_joint_basis, product_norm
from twin_bench.twin.layers.base import TwinLayer

ROUNDINGS = 4.0
"""The largest error of a joint basis, in units of the float32 rounding error of the layer's largest matrix."""


class FactoredLayer(TwinLayer):
    """A layer that multiplies its input by a matrix with exclusive vectors.

    If the experts' factors have a joint basis, the layer stores the basis instead of the factors, and `factors`
    computes the factors from it. `together` is what the layer's products are computed with.
    """

    is_matrix = True
    together: object

    def _store(self, B: Tensor, A: Tensor) -> None:
        """Store all experts' factors, B (m, R) and A (R, n), or their joint basis.

        The basis is computed from the factors as they are given, before they are cast to the weight's dtype.
        Factors that are rounded to half precision span different directions and have no joint basis.
        """
        owner = self.owner.cpu()
        columns = [owner == k for k, rank in enumerate(self.ranks) if rank]

        def noise() -> float:
            wide = torch.promote_types(self.weight.dtype, torch.float32)
            shared = float(torch.linalg.vector_norm(self.weight.detach(), dtype=wide))
            largest = max(shared, *(product_norm(B[:, own], A[own]) for own in columns))
            return ROUNDINGS * torch.finfo(torch.float32).eps * largest

        joint = find_joint_basis(*self.input_first(B, A), owner, self.fusion.experts, noise=noise)
        if joint is None:
            super()._store(B, A)
            return
        for part, tensor in joint._asdict().items():
            self.register_buffer(f"basis_{part}", tensor.to(self.weight), persistent=False)

    @property
    def basis(self) -> JointBasis | None:
        """The experts' joint basis, or None if the layer stores the factors themselves."""
        if "basis_down" not in self._buffers:
            return None
        return JointBasis(*(self._buffers[f"basis_{part}"] for part in JointBasis._fields))  # type: ignore[arg-type]

    def factors(self, used: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return B (m, r) and A (r, n) of the columns whose indices are in `used`, or of all R columns for None."""
        if (basis := self.basis) is None:
            return super().factors(used)
        inner, outer = (basis.inner, basis.outer) if used is None else (basis.inner[:, used], basis.outer[used])
        return self.input_first(basis.down @ inner, outer @ basis.up)

    def input_first(self, B: Tensor, A: Tensor) -> tuple[Tensor, Tensor]:
        """Return the factors in the order in which they multiply an input: (in, R) and (R, out).

        The function is its own inverse: it also returns B and A from these two.
        """
        return A.mT, B.mT

    def joint_cost(self) -> float:
        """Return an upper bound of the multiplications that a token's exclusive vectors cost, for any weights."""
        if (basis := self.basis) is None:
            return super().joint_cost()
        return float(basis.down.numel() + basis.cores[0].numel() + basis.up.numel())

"""Linear layers: y = W_s x + B (w * (A x)) for each row's weights w, or the fused weight for a whole batch."""

from __future__ import annotations

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from twin_bench.compat import Conv1D
from twin_bench.twin.basis import JointBasis, find_joint_basis, product_norm
from twin_bench.twin.layers.base import TwinLayer, by_row

ROUNDINGS = 4.0
"""The largest error of a joint basis, in units of the float32 rounding error of the layer's largest matrix."""


class TwinLinear(TwinLayer):
    """nn.Linear with exclusive vectors, weight (out, in).

    If the experts' factors have a joint basis, the layer stores the basis instead of the factors, and `factors`
    computes the factors from it.
    """

    replaces: ClassVar[tuple[type[nn.Module], ...]] = (nn.Linear,)
    is_matrix = True

    def _store(self, B: Tensor, A: Tensor) -> None:
        """Store all experts' factors, B (m, R) and A (R, n), or their joint basis.

        The basis is computed from the factors as they are given, before they are cast to the weight's dtype.
        Factors that are rounded to half precision span different directions and have no joint basis.
        """
        owner = self.owner.cpu()
        columns = [owner == k for k, rank in enumerate(self.ranks) if rank]

        def noise() -> float:
            shared = float(torch.linalg.vector_norm(self.weight.detach(), dtype=torch.float32))
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
        return A.T, B.T

    def plain(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Return the layer's output without exclusive vectors, (batch, ..., out), for x (batch, ..., in)."""
        return F.linear(x, weight, bias)

    def shared(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """Return the output of the shared expert's weight, (batch, ..., out), for x (batch, ..., in)."""
        return self.plain(x, self.weight, bias)

    @by_row
    def forward(self, x: Tensor) -> Tensor:
        """Return (batch, ..., out) for x (batch, ..., in)."""
        if self.fusion.mode == "fused":
            return self.plain(x, *self.current())
        shared_bias = self.fusion.mode == "shared" or self.bias is None or self.bias_vectors is None
        y = self.shared(x, self.bias if shared_bias else None)
        if self.fusion.mode == "shared":
            return y
        if sum(self.ranks):
            z, up = self._through_factors(x)
            y.view(-1, y.shape[-1]).addmm_(z, up)
        if self.entries is not None:
            self.entries.add_products(y, x, self.fusion, lambda x, matrix: self.plain(x, matrix, None))
        bias = None if shared_bias else self.row_bias(x.ndim)
        return y if bias is None else y.add_(bias)

    def joint_cost(self) -> float:
        """Return an upper bound of the multiplications that a token's exclusive vectors cost, for any weights."""
        if (basis := self.basis) is None:
            return super().joint_cost()
        return float(basis.down.numel() + basis.cores[0].numel() + basis.up.numel())

    def _through_factors(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return z (tokens, r) and `up` (r, out). Their product is the output of the rows' exclusive vectors.

        The cheaper of two computations is used: the columns of the experts in use, or the joint basis.
        """
        used, scale = self.row_columns(x.ndim)
        tokens, rows = x.shape[:-1].numel(), x.shape[0]
        if (basis := self.basis) is not None:
            columns = scale.shape[-1] * sum(self.weight.shape) * (1 + basis.down.shape[1] / tokens)
            if self.joint_cost() + basis.cores.numel() * rows / tokens < columns:
                mixed = self.fusion.kept(self, "mixed", lambda: self._mixed(basis))
                z = torch.bmm((x @ basis.down).view(rows, -1, mixed.shape[1]), mixed)
                return z.view(tokens, -1), basis.up
        down, up = self.fusion.kept(self, "factors", lambda: self.input_first(*self.factors(used)))
        return ((x @ down) * scale).view(tokens, -1) if up.shape[0] else x.new_zeros(tokens, 0), up

    def _mixed(self, basis: JointBasis) -> Tensor:
        """Return each row's weighted sum of the basis's cores."""
        weights = self.fusion.cast(basis.cores)
        return (weights @ basis.cores.flatten(1)).view(len(weights), *basis.cores.shape[1:])


class TwinConv1D(TwinLinear):
    """transformers' Conv1D (GPT-2) with exclusive vectors, weight (in, out): y = x W + b with W = B A."""

    replaces: ClassVar[tuple[type[nn.Module], ...]] = (Conv1D,)

    def input_first(self, B: Tensor, A: Tensor) -> tuple[Tensor, Tensor]:
        """Return the factors in the order in which they multiply an input: (in, R) and (R, out)."""
        return B, A

    def plain(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Return the layer's output without exclusive vectors, (batch, ..., out), for x (batch, ..., in)."""
        y = x @ weight
        return y if bias is None else y.add_(bias)

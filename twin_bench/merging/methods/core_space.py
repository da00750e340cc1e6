"""Core Space (Panariello et al., 2025): any merge of LoRA experts, done in their joint basis."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, cast

import torch
from torch import Tensor

from twin_bench.merging.registry import MergeMethod, find_method, merge_method
from twin_bench.merging.spectral import joint_basis, rounding
from twin_bench.merging.task_vectors import Merged, TaskVectors


@merge_method(title="Core Space", paper="arXiv:2509.17786", track="data-free")
def core_space(vectors: TaskVectors, *, merge: str = "ties", **options: Any) -> Mapping[str, Tensor]:
    """theta_0 + U M V^T, M another merge of the core matrices M_t = U^T tau_t V over a base of zeros.

    `merge` names that merge, which must be data-free, and `options` are its options: `ties`, `dare_ties` and
    `dare_task_arithmetic` are the paper's. U (m, a) is taken from the SVD of [tau_1 .. tau_T] and V (n, b) from that of
    [tau_1; ..; tau_T], each cut at its rank. No expert loses anything: tau_t = U M_t V^T. For T LoRA experts of rank r
    the core matrices are (T r, T r). A merge that adds, as task arithmetic does, gives the same result in Core Space as
    outside. Tensors of other dimensions are merged as they are. A tensor that no expert changed takes no part.

    A merge that sees entries, as TIES and DARE do, depends on the bases. The authors take them from the stacked factors
    of the LoRA checkpoints, [B_1 .. B_T] and [A_1; ..; A_T]. But an expert's factors are not unique: B R and R^-1 A are
    the same expert. Here B_t = U_t S_t and A_t = S_t V_t^T of the SVD of tau_t stand for them, so the merge depends on
    the experts' weights alone. On eight experts of MiniLM the update of a matrix by TIES has a cosine of 0.65 to 0.75
    with that of the authors' bases. Experts of any rank have a joint basis, full checkpoints too, where it only rotates
    inputs and outputs; the method is meant for LoRA. The authors trim each matrix separately in TIES. Here `ties` trims
    over all core matrices, as it does over a whole model.
    """
    inner = cast(MergeMethod, find_method(merge))  # MergeMethod.given rejects other kinds
    space = CoreSpace(vectors)
    merged = cast(Merged, inner.function(vectors.represented(space.enter, space), **options))
    return merged.map(space.leave)


class CoreSpace(Mapping[str, Tensor]):
    """The joint bases of task vectors. As a mapping it is the base model in Core Space: zeros."""

    def __init__(self, vectors: TaskVectors) -> None:
        self._vectors = vectors
        self._shapes: dict[str, torch.Size] = {}
        self._bases: dict[str, tuple[Tensor, Tensor]] = {}
        """U and V of the matrix that was read last, by its name."""

    def enter(self, name: str, taus: Tensor) -> Tensor:
        """Return the core matrices (T, a, b) of matrices tau (T, m, n), and tensors of other dimensions as they are.

        If an expert has only rounding error in a direction, its core is 0 there, so that signs of rounding error do not
        vote.
        """
        self._bases.clear()
        if not taus.any():
            taus = taus.new_zeros(len(taus), *(0 for _ in taus.shape[1:]))
        elif taus.ndim == 3:
            noise = rounding(self._vectors.base[name], taus)
            taus = self._vectors.as_linear(name, taus)
            U, V = joint_basis(name, taus, noise), joint_basis(name, taus.mT, noise)
            self._bases[name] = U, V
            taus = torch.stack([U.T @ tau @ V for tau in taus])
            for dim in (1, 2):
                taus.masked_fill_(torch.linalg.vector_norm(taus, dim=dim, keepdim=True) <= noise, 0.0)
        self._shapes[name] = taus.shape[1:]
        return taus

    def leave(self, name: str, zeros: Tensor, core: Tensor) -> Tensor:
        """Return a parameter, given its merged core matrix, or its merged task vector if it is no matrix."""
        base = self._vectors.base[name].detach().to(core)
        if name in self._bases:
            U, V = self._bases[name]
            return base + self._vectors.as_linear(name, U @ core @ V.T)
        return base + core if core.numel() else base

    def __getitem__(self, name: str) -> Tensor:
        base = self._vectors.base[name]
        if not base.is_floating_point():
            return base
        if name not in self._shapes:
            self.enter(name, self._vectors[name])
        return base.new_zeros(self._shapes[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self._vectors)

    def __len__(self) -> int:
        return len(self._vectors)

"""Exclusive vectors: what is kept of theta_t - theta_s, parameter by parameter.

The method is that of Twin-Merging (arXiv:2406.15479). A kind decides what is kept of a matrix. Differences of 1-D
tensors are kept unchanged, as in the authors' code.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from twin_bench.checkpoints.factors import Factors
from twin_bench.checkpoints.finite import require_no_overflow, require_weights
from twin_bench.errors import InputError
from twin_bench.merging.linear_algebra import truncated_svd
from twin_bench.twin.exclusive.forms import Exclusive, ExpertDifferences, Keep, keep_nothing
from twin_bench.twin.exclusive.registry import find_kind

__all__ = ["Exclusive", "exclusive_vector"]


def exclusive_vector(
    expert: Mapping[str, Tensor],
    shared: Mapping[str, Tensor],
    *,
    kind: str = "svd",
    name: str = "",
    seed: int = 0,
    without: Container[str] = (),
    device: str | torch.device = "cpu",
    decompose: Callable[..., Factors] | None = None,
    keep: Keep = keep_nothing,
    **options: Any,
) -> Exclusive:
    """Return v_t of one expert over the shared expert, parameter by parameter.

    Args:
        expert: The expert's parameters theta_t, by name.
        shared: The shared expert's parameters theta_s, under the same names. Only floating-point tensors are compared.
        kind: How matrices are kept: the name of a function in `twin_bench/twin/exclusive/kinds/`.
        name: The expert's name, which draws depend on.
        seed: The seed of a randomised SVD, and of draws.
        without: Names of parameters of which nothing is kept.
        device: Where matrices are decomposed and sorted. What is kept of them is on the CPU.
        decompose: What computes `truncated_svd`, or has kept it; by default that function.
        keep: Where decompositions are kept, if anywhere.
        **options: The kind's options, for example `rank` or `density`.

    Returns:
        An exclusive vector in float32, or in float64 for float64 parameters. Equal parameters are left out.

    Raises:
        InputError: An option is out of range, a tensor holds NaN or inf, a tensor of three or more dimensions differs,
            or the SVD of a difference fails.
    """

    def difference(parameter: str, on: str | torch.device = "cpu") -> Tensor | None:
        found = exact_difference(expert[parameter], shared[parameter], parameter)
        return found.to(on) if found.any() else None

    header = find_kind(kind)
    header.require(options)
    compared = {name: base for name, base in shared.items() if base.is_floating_point() and name not in without}
    for parameter, base in compared.items():
        if base.ndim not in (1, 2) and difference(parameter) is not None:
            raise InputError(f"tensor {parameter} has {base.ndim} dimensions: a twin fuses matrices and vectors")
    vectors = {name: difference(name) for name, base in compared.items() if base.ndim == 1}
    return header.of(
        ExpertDifferences(
            expert=name,
            seed=seed,
            model_bytes=sum(tensor.nbytes for tensor in shared.values()),
            vectors={name: vector for name, vector in vectors.items() if vector is not None},
            shapes={name: base.shape for name, base in compared.items() if base.ndim == 2},
            matrix=partial(difference, on=device),
            svd=partial(decompose or truncated_svd, seed=seed),
            keep=keep,
        ),
        options,
    )


def exact_difference(theirs: Tensor, base: Tensor, name: str) -> Tensor:
    """Return theta_t - theta_s of one parameter in float32 or better. InputError if a number of it is not finite."""
    exact = torch.promote_types(base.dtype, torch.float32)
    theirs = require_weights(theirs, name, "expert")
    difference = theirs.to(exact) - require_weights(base, name, "shared expert").to(exact)
    return require_no_overflow(difference, name, "exclusive vectors")

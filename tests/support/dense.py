"""Models made for one sample at a time from the papers' formulas, in float64, and what twins are given beside them."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from tests.support.families import DENSITY, SCALING, Family


def batch(rows: int, seed: int = 0) -> dict[str, Tensor]:
    """Return token ids of lengths 9, 8, 7, 6, 9, ..., padded on the right."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(4, 26, (rows, 9), generator=generator)
    mask = torch.ones_like(ids)
    for row in range(rows):
        mask[row, 9 - row % 4 :] = 0
    ids = ids * mask
    return {"input_ids": ids, "attention_mask": mask}


def mixes(rows: int, experts: int, seed: int = 0) -> dict[str, Tensor]:
    """Return kinds of fusion weights: one-hot, sharp, diffuse, negative and beyond 1, all mixed, all equal."""
    generator = torch.Generator().manual_seed(seed)
    one_hot = torch.eye(experts)[torch.randint(experts, (rows,), generator=generator)]
    diffuse = torch.softmax(torch.randn(rows, experts, generator=generator), dim=1)
    return {
        "one_hot": one_hot,
        "sharp": torch.softmax(30 * one_hot + torch.randn(rows, experts, generator=generator), dim=1),
        "diffuse": diffuse,
        "any real number": 2 * torch.randn(rows, experts, generator=generator),
        "mixed": torch.where(torch.arange(rows)[:, None] % 2 == 0, one_hot, diffuse),
        "equal": diffuse[:1].repeat(rows, 1),
        "none": torch.zeros(rows, experts),
    }


Keep = Callable[[str, str, Tensor], Tensor]
"""A function (task, name, difference (m, n) in float64) -> what an exclusive vector keeps of it."""


def truncated(task: str, name: str, v: Tensor) -> Tensor:
    """Return the truncated SVD of the families' density."""
    rank = int(DENSITY * min(v.shape))
    U, S, Vh = torch.linalg.svd(v)
    return U[:, :rank] @ torch.diag(S[:rank]) @ Vh[:rank]


def whole(task: str, name: str, v: Tensor) -> Tensor:
    """Return all of the difference."""
    return v


def dense(family: Family, weights: Tensor, keep: Keep = truncated) -> Any:
    """Return one sample's model, every parameter fused for it in float64, from the paper's formulas.

    A classifier's head, which is a task's own, stays the base model's.
    """
    theta_0 = {name: p.detach().double() for name, p in family.base.named_parameters()}
    thetas = {task: dict(model.named_parameters()) for task, model in family.experts.items()}
    model = copy.deepcopy(family.base).double()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if family.labels and not name.startswith(f"{model.base_model_prefix}."):
                continue
            shared = theta_0[name] + SCALING * sum(theta[name].double() - theta_0[name] for theta in thetas.values())
            fused = shared.clone()
            for weight, (task, theta) in zip(weights.double(), thetas.items(), strict=True):
                v = theta[name].double() - shared
                fused += weight * (keep(task, name, v) if v.ndim == 2 else v)
            parameter.copy_(fused)
    return model


def interpolated_logits(base: Any, experts: dict[str, Any], task: str, inputs: Any, scaling: float = 1.0) -> Tensor:
    """Return one sample's logits: every expert run under the task's head, then theta_0 + sum_t w_t tau_t."""
    model: Any = copy.deepcopy(experts[task]).double()
    theta_0 = {name: p.double() for name, p in base.base_model.state_dict().items()}
    thetas = [{name: p.double() for name, p in e.base_model.state_dict().items()} for e in experts.values()]
    confidences = []
    for theta in thetas:
        model.base_model.load_state_dict(theta)
        with torch.no_grad():
            probabilities = model(**inputs).logits[0].softmax(dim=0).tolist()
        confidences.append(math.exp(sum(p * math.log(p) for p in probabilities)))
    weights = [scaling * confidence / sum(confidences) for confidence in confidences]
    model.base_model.load_state_dict(
        {n: p + sum(w * (theta[n] - p) for w, theta in zip(weights, thetas, strict=True)) for n, p in theta_0.items()}
    )
    with torch.no_grad():
        logits: Tensor = model(**inputs).logits[0]
    return logits

"""Which models of a twin are exported: experts, and mixtures of them. Each is a vector of fusion weights."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from twin_bench.checkpoints.sources import require_expert_name
from twin_bench.errors import InputError, nearest, shown
from twin_bench.twin.arguments import LARGEST_WEIGHT

MIXTURE = "mixture"
"""The name of a mixture that is given none."""


@dataclass(frozen=True)
class Selection:
    """What is exported: one `expert`, or `mixtures`, fusion weights (experts,) by name; with neither, every expert."""

    expert: str | None = None
    mixtures: Mapping[str, Tensor] = field(default_factory=dict)

    def models(self, experts: Sequence[str]) -> dict[str, Tensor]:
        """Return the fusion weights (experts,) of each model by name: the experts' own, then the mixtures'."""
        own = torch.eye(len(experts))
        chosen = experts if self.expert is None else [self.expert]
        return {**{name: own[experts.index(name)] for name in chosen}, **self.mixtures}

    def one(self, experts: Sequence[str]) -> tuple[str, Tensor]:
        """Return the name and the fusion weights (experts,) of the one model that is exported.

        InputError where none or several are named.
        """
        models = self.models(experts) if self.expert is not None else dict(self.mixtures)
        if len(models) != 1:
            raise InputError(
                f"this format is one model, and {len(models) or 'none'} {'are' if len(models) > 1 else 'is'} named; "
                f"give --expert NAME, or --weights with a number for each of {', '.join(experts)}"
            )
        return next(iter(models.items()))


def selection(experts: Sequence[str], expert: str | None, weights: Sequence[str]) -> Selection:
    """Return what is asked for.

    Args:
        experts: the experts' names, in the order of the weights.
        expert: the name of one, or None.
        weights: texts such as `0.2,0.8,0`, or `calm=0.2,0.8,0` for a mixture with a name.

    Raises:
        InputError: an expert that there is not, both an expert and weights, a number too many or too few, one that is
            not finite or too large, a mixture without any weight, or a name that is unsafe or used twice.
    """
    if expert is not None and weights:
        raise InputError("give --expert or --weights, not both")
    if expert is not None and expert not in experts:
        raise InputError(f"--expert {shown(expert)}: the twin has no such expert{nearest(expert, experts)}")
    mixtures: dict[str, Tensor] = {}
    for text in weights:
        name, _, numbers = text.rpartition("=")
        name = name or MIXTURE
        require_expert_name(name)
        if name in mixtures or name in experts:
            raise InputError(f"--weights {shown(text)}: {name} is another model's name; give NAME=W1,W2,... a new one")
        mixtures[name] = _numbers(numbers, experts, f"--weights {shown(text)}")
    return Selection(expert, mixtures)


def _numbers(text: str, experts: Sequence[str], where: str) -> Tensor:
    given = text.split(",")
    if len(given) != len(experts):
        raise InputError(
            f"{where}: {len(given)} numbers for {len(experts)} experts; give one for each of {', '.join(experts)}, in "
            "this order, with commas between them"
        )
    return torch.tensor([_number(one, name, where) for one, name in zip(given, experts, strict=True)])


def _number(text: str, expert: str, where: str) -> float:
    try:
        number = float(text)
    except ValueError:
        raise InputError(f"{where}: {shown(text)}, the weight of {expert}, is no number") from None
    if not math.isfinite(number) or abs(number) > LARGEST_WEIGHT:
        raise InputError(
            f"{where}: the weight of {expert} is {text.strip()}; give a finite number, of size {LARGEST_WEIGHT:g} at "
            "most"
        )
    return number

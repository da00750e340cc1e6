"""What a twin is made of besides its shared expert, and the protocols and routings it runs under."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from torch import Tensor

from twin_bench.merging.registry import PROTOCOLS, ProtocolName
from twin_bench.twin.exclusive import Exclusive
from twin_bench.twin.paper import PaperFactors
from twin_bench.twin.router import Router

__all__ = ["PROTOCOLS", "ROUTINGS", "PaperParts", "Parts", "ProtocolName", "Routing"]

Routing = Literal["router", "task", "none"]
ROUTINGS: tuple[Routing, ...] = ("router", "task", "none")


@dataclass(frozen=True)
class PaperParts:
    """What only the authors' protocol needs.

    Of classifiers the pretrained biases, with which their router's features are taken; of language models whose
    experts are adapters these, to be merged as the authors do; and, where test rows were given to select it,
    their router.
    """

    biases: Mapping[str, Tensor] = field(default_factory=dict)
    router: Router | None = None
    factors: PaperFactors | None = None


@dataclass(frozen=True)
class Parts:
    """A twin without its shared expert: what TwinModel adds to a Hugging Face model.

    A static merge is a twin with heads and no exclusive vectors; a language model's has no heads either.
    `max_length`: tokens that an input is truncated to where nothing else is said (None: the kind's own default).
    `sensitivity`: how far logits move with the weights (`twin_bench.twin.tolerance`), None where nobody measured it.
    """

    heads: Mapping[str, Mapping[str, Tensor]] = field(default_factory=dict)
    exclusive: Mapping[str, Exclusive] = field(default_factory=dict)
    router: Router | None = None
    paper: PaperParts | None = None
    max_length: int | None = None
    sensitivity: float | None = None
    digests: Mapping[str, str] = field(default_factory=dict)

"""The parts of a twin other than its shared expert, and the names of protocols and routings."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from torch import Tensor

from twin_bench.twin.exclusive import Exclusive
from twin_bench.twin.paper import PaperFactors
from twin_bench.twin.routers.base import Router

Routing = Literal["router", "task", "none"]
ROUTINGS: tuple[Routing, ...] = ("router", "task", "none")


@dataclass(frozen=True)
class PaperParts:
    """The parts that only the protocol paper needs.

    `biases` are a classifier's pretrained biases, with which the authors' router computes its features. `left_out` are
    the biases, as differences from the shared expert, that each expert's exclusive vector leaves out below a layer: the
    protocol takes all biases from the true task's expert. `density` is
    the density of a classifier's exclusive vectors, or None if they were given a rank (see `paper.authors_rank`).
    `factors` are a language model's LoRA experts, which the authors merge factor by factor.
    `router` is the router that was selected on test rows, or None if there were none.
    """

    biases: Mapping[str, Tensor] = field(default_factory=dict)
    router: Router | None = None
    factors: PaperFactors | None = None
    density: float | None = None
    left_out: Mapping[str, Mapping[str, Tensor]] = field(default_factory=dict)


@dataclass(frozen=True)
class Parts:
    """The parts of a twin that TwinModel adds to a Hugging Face model with the shared expert's weights.

    `heads` holds each task's head by parameter name, `exclusive` each expert's exclusive vector. A static merge has
    heads and no exclusive vectors; a language model has no heads.
    `max_length` is the default length in tokens to which an input is truncated. None means 128 for a classifier, and
    the model's window for a language model.
    `sensitivity` says how far logits move with the fusion weights (see `twin_bench.twin.tolerance`). It is None if it
    was not measured. `digests` holds one sha256 for the shared expert, for each expert and for the router.
    `copies` says whether the devices have room for a fused copy of each weight that an expert changes.
    """

    heads: Mapping[str, Mapping[str, Tensor]] = field(default_factory=dict)
    exclusive: Mapping[str, Exclusive] = field(default_factory=dict)
    router: Router | None = None
    paper: PaperParts | None = None
    max_length: int | None = None
    sensitivity: float | None = None
    digests: Mapping[str, str] = field(default_factory=dict)
    copies: bool = True

"""The interface of routers: features in, one logit for each expert out, and how logits become fusion weights."""

from __future__ import annotations

import abc
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, Self, get_args

import torch
from torch import Tensor, nn

from twin_bench.checkpoints.finite import all_finite
from twin_bench.errors import InputError, nearest, shown
from twin_bench.twin.features import POOLINGS, Pooling, Read
from twin_bench.twin.finite import require_finite

Confidence = Literal["probability", "logit"]
"""What a router's threshold is compared with: the largest weight before `top_k`, or the largest logit."""


@dataclass(frozen=True)
class RouterConfig:
    """A router's input, and how its logits become weights.

    `layer` is the hidden state that the router reads: 0 for the embeddings, k for the output of block k, -1 for the
    last. `layers` are those of a router that reads several, one behind the other; `layer` is then the last of them.
    `pooling` says how a text's hidden states become one vector. `width` is the number of the router's features.
    `temperature` divides the logits. `top_k` keeps only the largest weights and renormalises them; 0 keeps all.
    A row whose confidence is under `threshold` gets no weight at all, so that the shared expert answers it.
    """

    experts: tuple[str, ...]
    width: int
    layer: int = -1
    top_k: int = 0
    temperature: float = 1.0
    kind: str = "mlp"
    layers: tuple[int, ...] = ()
    pooling: Pooling = "mean"
    threshold: float | None = None

    @property
    def reads(self) -> tuple[Read, ...]:
        """The hidden states that the router reads, in the order of its features."""
        return tuple(Read(layer, self.pooling) for layer in self.layers or (self.layer,))


@dataclass(frozen=True)
class Examples:
    """What a router is made from: the features of training rows, and the experts that own them.

    `features` is (N, width) and `owners` (N,), the indices of the rows' experts. `held_out` (M, width) and
    `held_out_owners` (M,) are of rows that choose between routers, such as the epochs of one training. `directions`
    returns what each expert reads of the hidden state: see `Router.reads_experts`. `epochs` counts the passes of
    a training over the rows; None leaves the number to the kind. `advance` is called after each epoch with the number
    of all. All tensors are on the CPU, and so is the router that is made. `device` is where many steps may run.
    """

    features: Tensor
    owners: Tensor
    held_out: Tensor
    held_out_owners: Tensor
    epochs: int | None = None
    seed: int = 0
    directions: Callable[[], Sequence[Tensor]] = tuple
    advance: Callable[[int], None] = field(default=lambda epochs: None)
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    def counts(self, experts: int) -> list[int]:
        """Return the number of training rows of each expert."""
        return [int((self.owners == expert).sum()) for expert in range(experts)]

    def few(self, experts: int, rows: int) -> list[Tensor]:
        """Return the features of the first `rows` rows of each expert, in float64."""
        return [self.features[self.owners == expert][:rows].double() for expert in range(experts)]


class Router(nn.Module, abc.ABC):
    """A router. A kind has one file, with `@router_kind` above its class, `fit` and `forward`.

    `trains` says that a fit takes many steps. The layer of such a router is chosen by a closed-form probe, and of any
    other by the router itself. `reads_experts` says that a fit reads the exclusive vectors: `Examples.directions`.
    `confidence_of` is what a threshold is compared with, or None for a kind that is as sure of one input as of any
    other, which has no threshold. `notes` is what a fit tells about itself, as plain data.
    """

    kind: ClassVar[str]
    trains: ClassVar[bool] = False
    reads_experts: ClassVar[bool] = False
    confidence_of: ClassVar[Confidence | None] = "probability"

    def __init__(self, config: RouterConfig) -> None:
        """Keep the config. InputError if a number of it is out of its range."""
        super().__init__()
        check_config(config)
        self.config = config
        self.notes: dict[str, Any] = {}

    @classmethod
    @abc.abstractmethod
    def fit(cls, config: RouterConfig, examples: Examples) -> Router:
        """Return a router made from examples. Keywords with a default are the options of the kind.

        The result depends on the arguments alone, and the global random state is not changed.
        """

    @classmethod
    def check(cls, counts: Sequence[int], width: int, options: Mapping[str, Any]) -> None:
        """Raise an InputError for options of `fit` that the number of training rows or features does not allow.

        It is called before any feature is computed. `counts` are the numbers of training rows of the experts.
        """

    @abc.abstractmethod
    def forward(self, features: Tensor) -> Tensor:
        """Return logits (N, T) for features (N, width)."""

    @classmethod
    def restored(cls, config: RouterConfig, state: Mapping[str, Tensor]) -> Self:
        """Return the router of a state dict."""
        router = cls(config)
        router.load_state_dict(dict(state))
        return router

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Move to the twin's device, but keep float32 when the twin is cast to half precision."""
        return super()._apply(lambda tensor: tensor.to(fn(tensor).device), recurse)

    @torch.no_grad()
    def weights(self, features: Tensor, rows: Sequence[int] | None = None) -> Tensor:
        """Return fusion weights (N, T) in float32 for features (N, width).

        Each row sums to 1, or to 0 where the router's confidence is under its threshold.

        InputError if a weight is not finite, because a feature or a logit is not. It names the row by its number in
        `rows`, by default 0 to N - 1.
        """
        tensors = itertools.chain(self.parameters(), self.buffers())
        own = next((tensor for tensor in tensors if tensor.is_floating_point()), None)
        logits = self(features.float() if own is None else features.to(own))
        weights = fusion_weights(logits, self.config)
        if not all_finite(weights):
            read = f"the features that the router reads on layer {self.config.layer}"
            require_finite(features, read, "the model overflows: try float32 or bfloat16, or check its weights", rows)
            require_finite(weights, "the router's weights", "its logits overflow: build the twin again", rows)
        if self.config.threshold is None:
            return weights
        return weights * (self.confidence(logits) >= self.config.threshold)[:, None]

    def confidence(self, logits: Tensor) -> Tensor:
        """Return how sure the router is of each row, (N,), for logits (N, T)."""
        if self.confidence_of == "logit":
            return logits.amax(dim=1)
        return torch.softmax(logits.float() / self.config.temperature, dim=-1).amax(dim=1)


class StoredRouter(Router):
    """A router that is made of tensors which a fit computes, and that are not trained: its buffers."""

    def __init__(self, config: RouterConfig, **tensors: Tensor) -> None:
        """Keep the tensors under their names, floating-point ones in float32."""
        super().__init__(config)
        for name, tensor in tensors.items():
            self.register_buffer(name, tensor.float() if tensor.is_floating_point() else tensor)

    @classmethod
    def restored(cls, config: RouterConfig, state: Mapping[str, Tensor]) -> Self:
        """Return the router of a state dict."""
        return cls(config, **state)


def check_config(config: RouterConfig) -> None:
    """Raise an InputError that names a number of a router's config, which comes from a file, and what it must be."""
    experts, temperature, threshold = len(config.experts), config.temperature, config.threshold
    if not _is_number(temperature) or not temperature > 0:
        raise InputError(f"router: temperature must be above 0, not {shown(temperature)}")
    for name, low, high in (("width", 1, math.inf), ("layer", -1, math.inf), ("top_k", 0, experts)):
        value = getattr(config, name)
        if type(value) is not int or not low <= value <= high:
            upper = f"to {experts}" if name == "top_k" else "or more"
            raise InputError(f"router: {name} must be a whole number, {low} {upper}, not {shown(value)}")
    if any(type(layer) is not int or layer < -1 for layer in config.layers):
        raise InputError(f"router: layers must be whole numbers, -1 or more, not {shown(config.layers)}")
    if config.pooling not in get_args(Pooling):
        raise InputError(f"router: unknown pooling {shown(config.pooling)}{nearest(str(config.pooling), POOLINGS)}")
    if threshold is not None and not _is_number(threshold):
        raise InputError(f"router: threshold must be a number, not {shown(threshold)}")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def fusion_weights(logits: Tensor, config: RouterConfig) -> Tensor:
    """Return softmax(logits / temperature), (N, T). Weights beyond the `top_k` largest are set to 0."""
    weights = torch.softmax(logits.float() / config.temperature, dim=-1)
    if config.top_k:
        kept = torch.zeros_like(weights).scatter_(1, weights.topk(config.top_k).indices, 1.0)
        weights = weights * kept
        weights = weights / weights.sum(dim=-1, keepdim=True)
    return weights

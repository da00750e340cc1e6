"""A control: a twin's router chooses one expert for each input, and that expert answers whole."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from twin_bench.checkpoints.sources import Sources
from twin_bench.contenders.context import Contender, Context
from twin_bench.contenders.storage import folder_bytes, head_bytes, model_bytes
from twin_bench.contenders.twins import DEFAULT_EXCLUSIVE, RoutedOptions, built_twin, check_twin, checked_options
from twin_bench.errors import InputError, UnsuitedError
from twin_bench.measured import Meter
from twin_bench.merging.registry import ServedMethod, served_method
from twin_bench.twin.directory import load_twin
from twin_bench.twin.exclusive import Exclusive
from twin_bench.twin.fusion import Fusion
from twin_bench.twin.model import TwinModel, twin_class
from twin_bench.twin.plan import Costs
from twin_bench.twin.speed import DeviceSpeed

DEAR = 1e9
"""A cost that the planner always avoids."""


@dataclass(frozen=True, kw_only=True)
class RoutedMethod(ServedMethod):
    """The header of what has a twin's router and no exclusive vectors."""

    def checked(self, options: Mapping[str, Any]) -> dict[str, Any]:
        """Return the options as plain data, defaults included. An InputError names the key that is wrong."""
        return checked_options(RoutedOptions, options)


def check_routed(context: Context, *, shared: Mapping[str, Any], router: Mapping[str, Any]) -> None:
    """Raise an InputError for settings of the twin that these experts do not allow."""
    check_twin(context, shared=shared, exclusive=DEFAULT_EXCLUSIVE, router=router, weights="router")


@served_method(
    title="The expert that a router chooses",
    paper="arXiv:2406.15479",
    track="per-input",
    needs=("task ids of training inputs", "seed"),
    sees=("training rows",),
    protocols=("standard", "routed"),
    check_options=check_routed,
    kind=RoutedMethod,
)
def routed_expert(
    context: Context,
    *,
    shared: Mapping[str, Any] = MappingProxyType({"method": "task_arithmetic", "scaling": 0.3}),
    router: Mapping[str, Any] = MappingProxyType({"layer": -1}),
) -> Iterator[Contender]:
    """theta_t for the task t with the largest weight w_t(x): a twin's router, and one whole expert for each input.

    A control for `twin`: nothing is compressed, and no two experts are mixed. The router is that of the twin with these
    settings. It reads the shared expert, so T + 1 whole models are stored, the heads and the router. The build is that
    of the twin. A suite with both builds one, if the twin's exclusive vectors have the default density.
    """
    built = built_twin(context, shared, DEFAULT_EXCLUSIVE, router)  # one build with a twin of defaults
    with Meter(context.device) as meter:
        loaded = load_twin(built.directory, dtype=context.dtype, trust_remote_code=built.recipe.trust_remote_code)
        chooser = loaded.parts.router
        assert chooser is not None
        chooser.config = dataclasses.replace(chooser.config, top_k=1)
        nothing = {name: Exclusive({}, {}) for name in loaded.parts.exclusive}
        parts = dataclasses.replace(loaded.parts, exclusive=nothing, sensitivity=None)
        twin = twin_class(loaded.task_type)(loaded.model, loaded.tokenizer, parts, protocol=context.protocol)
        install_experts(twin, context.sources, rounded=context.dtype is not None)
    twin.feature_cache = context.feature_cache
    sources, directory = context.sources, built.directory
    whole = sum(model_bytes(sources, expert) for expert in sources.experts.values()) + folder_bytes(directory / "model")
    yield Contender(
        twin,
        context.names,
        meter.taken.after(built.build),
        (len(sources.experts) + 1) * built.manifest["parameters"]["shared"],
        whole + head_bytes(sources) + folder_bytes(directory / "router"),
        {"router": {key: value for key, value in built.manifest["router"].items() if key != "paper"}},
    )


def install_experts(twin: TwinModel, sources: Sources, *, rounded: bool) -> None:
    """Let whole experts answer for `twin`, which has no exclusive vectors: that with a row's largest fusion weight.

    Raises UnsuitedError for an expert that the twin's dtype would round, unless `rounded` says that this was asked for.
    """
    kept = _Kept()
    for place, name in enumerate(twin.expert_names):
        expert = sources.experts[name]
        for key in sources.skeleton.backbone:
            theirs, ours = expert[key], twin.model.get_parameter(key)
            exact = key in expert.low_rank or torch.promote_types(theirs.dtype, ours.dtype) == ours.dtype
            if not exact and not rounded:
                raise UnsuitedError(
                    f"expert {name!r}: {key} is {theirs.dtype}, and the twin is served in {ours.dtype}, which rounds "
                    f"it; give the suite dtype: {str(theirs.dtype).removeprefix('torch.')}"
                )
            theirs = theirs.to(ours)
            if not torch.equal(theirs, ours):
                kept.keep(place, key, theirs)
    twin.add_module("whole_experts", kept)
    twin.fusion = WholeExperts(twin.model, kept, twin.expert_names)


class _Kept(nn.Module):
    """The parameters in which experts differ from the shared one. They move with the twin, and are in no state dict."""

    def keep(self, place: int, name: str, tensor: Tensor) -> None:
        """Keep the parameter `name` of the expert whose number is `place`."""
        self.register_buffer(f"{place}/{name.replace('.', '/')}", tensor, persistent=False)

    def of(self, place: int) -> dict[str, Tensor]:
        """Return an expert's parameters by name."""
        prefix = f"{place}/"
        own = ((key, tensor) for key, tensor in self.named_buffers() if key.startswith(prefix))
        return {key.removeprefix(prefix).replace("/", "."): tensor for key, tensor in own}


class WholeExperts(Fusion):
    """Puts one expert's own parameters into the model for the time of a block, where a Fusion would fuse.

    The expert is that with the largest weight. Where no expert has any, the shared expert stays. Tensors are exchanged
    and not copied.
    """

    def __init__(self, model: nn.Module, kept: _Kept, names: tuple[str, ...]) -> None:
        super().__init__(len(names))
        self._model, self._kept, self._names = model, kept, names
        self._placed: int | None = None
        self._aside: dict[str, Tensor] = {}

    @contextmanager
    def shared(self) -> Iterator[None]:
        """Run the block with the shared expert."""
        with super().shared(), self._placing(None):
            yield

    @contextmanager
    def fuse(self, weights: Tensor, bias_weights: Tensor | None = None) -> Iterator[None]:
        """Run the block with the expert that has the largest of the weights (experts,)."""
        (chosen,) = _largest(weights[None])
        with super().fuse(weights, bias_weights), self._placing(chosen):
            yield

    @contextmanager
    def per_row(self, weights: Tensor, bias_weights: Tensor | None = None, *, steps: bool = False) -> Iterator[None]:
        """Run the block with the expert that has the largest weight in all rows of weights (batch, experts).

        InputError if the rows have several: they can't run together.
        """
        chosen = _largest(weights)
        if len(chosen) > 1:
            named = ", ".join("the shared one" if expert is None else self._names[expert] for expert in chosen)
            raise InputError(
                f"the rows of a batch go to several whole experts ({named}), which can't run together; give the rows "
                "one by one, or as a list of requests"
            )
        with super().per_row(weights, bias_weights, steps=steps), self._placing(chosen[0]):
            yield

    def costs(self, speed: DeviceSpeed | None = None) -> Costs:
        """Return costs with which the planner runs all rows of one expert together, and no others with them."""
        free, dear = (0.0,) * self.experts, (DEAR,) * self.experts
        return dataclasses.replace(super().costs(speed), fuse=free, rebuild=0.0, fusion=0.0, columns=dear, joint=DEAR)

    @contextmanager
    def _placing(self, expert: int | None) -> Iterator[None]:
        before = self._placed
        self._place(expert)
        try:
            yield
        finally:
            self._place(before)

    def _place(self, expert: int | None) -> None:
        """Put an expert's parameters into the model, or the shared expert's for None."""
        if expert == self._placed:
            return
        for name, ours in self._aside.items():
            self._model.get_parameter(name).data = ours
        self._aside = {}
        for name, theirs in ({} if expert is None else self._kept.of(expert)).items():
            parameter = self._model.get_parameter(name)
            self._aside[name], parameter.data = parameter.data, theirs
        self._placed = expert


def _largest(weights: Tensor) -> list[int | None]:
    """Return the experts with the largest weights in rows (batch, experts), each once; None for rows of zeros."""
    chosen = torch.where(weights.any(dim=1), weights.argmax(dim=1), -1)
    return [None if place < 0 else place for place in sorted(set(chosen.tolist()))]

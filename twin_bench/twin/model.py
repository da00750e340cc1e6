"""TwinModel: a Hugging Face model, its experts' exclusive vectors and a router. All kinds of twins inherit from it."""

from __future__ import annotations

import abc
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from twin_bench.data.task import TaskType
from twin_bench.errors import InputError, nearest
from twin_bench.protocols import PROTOCOLS, ProtocolName
from twin_bench.twin.arguments import (
    checked_batch,
    checked_length,
    one_hot,
    require_texts,
    require_weights,
    tasks_of,
)
from twin_bench.twin.cache import backbone_digest, kept_features
from twin_bench.twin.device import usable_device
from twin_bench.twin.encoded import Encoded, Text, alike, distinct
from twin_bench.twin.features import Read, hidden_states, in_order, pool, reads_of
from twin_bench.twin.fusion import Fusion
from twin_bench.twin.layers import install
from twin_bench.twin.memory import Use, memory_limit
from twin_bench.twin.parts import ROUTINGS, Parts, Routing
from twin_bench.twin.placement import Devices, require_movable
from twin_bench.twin.plan import Group
from twin_bench.twin.planned import PlannedModel
from twin_bench.twin.routers.base import Router
from twin_bench.twin.tolerance import allowed_tolerance, simplified


class TwinModel(PlannedModel, abc.ABC):
    """A model that computes theta_s + sum_t w_t(x) v_t for every row of a batch.

    The fusion is exact, or within a tolerance of the logits. `from_pretrained` returns the kind of twin that a
    directory holds: a TwinClassifier, a TwinCausalLM or a TwinSeq2Seq. Each documents what a protocol means for it.

    `routing` names the source of the fusion weights that a caller does not give:

    - `router`: the twin's router;
    - `task`: the row's true task. Its expert has weight 1. Such a score uses what a router has to find out;
    - `none`: no expert has any weight, so the model is theta_s.

    `feature_cache` is the directory in which the router's features are kept between runs. None, the default, keeps
    none. How its lists are planned: see `PlannedModel`.
    """

    task_type: ClassVar[TaskType]
    max_length: int
    feature_cache: Path | None = None

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        parts: Parts,
        *,
        protocol: ProtocolName = "standard",
        routing: Routing = "router",
        tolerance: float | None = None,
    ) -> None:
        """Make a twin of `model`, a transformers model that holds the shared expert. The model is changed in place."""
        super().__init__()
        if protocol not in PROTOCOLS:
            raise InputError(f"unknown protocol {protocol!r}{nearest(protocol, PROTOCOLS)}")
        if routing not in ROUTINGS:
            raise InputError(f"unknown routing {routing!r}{nearest(routing, ROUTINGS)}")
        if protocol == "routed" and routing != "router":
            raise InputError(f"protocol routed takes the head from the router, and routing is {routing}")
        self.protocol: ProtocolName = protocol
        self.routing: Routing = routing
        self.tokenizer = tokenizer
        self.expert_names = tuple(parts.exclusive)
        self.digests = dict(parts.digests)
        self.fusion = self._install(model, parts)
        self.fusion.keeps_copies = self.fusion.keeps_copies and parts.copies
        self.model = model
        self.router = parts.router
        self.router_overrides: Mapping[str, Tensor] = {}  # replace the backbone's parameters when the router reads it
        self.sensitivity = parts.sensitivity
        self._asked_tolerance = tolerance
        self.tolerance = self._allowed()
        self._complete(parts)
        if self.router is not None:
            self.router.to(self.device)
        self.requires_grad_(False)
        self.eval()

    def __init_subclass__(cls, **options: Any) -> None:
        """Make a class that names its `task_type` the one that serves such models."""
        super().__init_subclass__(**options)
        if "task_type" in cls.__dict__:
            _KINDS[cls.task_type] = cls

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        """Move or convert all tensors, as `to`, `half` and `cuda` do, and what is computed from them with them."""
        require_movable(self.model)
        super()._apply(fn, recurse)
        self.fusion.forget()
        for measured in ("costs", "sizes"):  # those of another device or dtype
            self.__dict__.pop(measured, None)
        self.router_overrides = {name: fn(tensor) for name, tensor in self.router_overrides.items()}
        self.tolerance = self._allowed()
        return self

    def _allowed(self) -> float:
        known = self.sensitivity, len(self.expert_names)
        return allowed_tolerance(self._asked_tolerance, self.protocol, self.model.dtype, *known)

    @abc.abstractmethod
    def _complete(self, parts: Parts) -> None:
        """Add the attributes of this kind of twin: at least `max_length`."""

    @abc.abstractmethod
    def probe(self, encoded: Sequence[Encoded], tasks: Sequence[str], weights: Tensor) -> list[Tensor]:
        """Return the logits that each row's answer is read from: (labels,) or (vocabulary,) each, on the CPU."""

    def _install(self, model: Any, parts: Parts) -> Fusion:
        return install(model, parts.exclusive)

    @classmethod
    def from_pretrained(
        cls,
        directory: str | Path,
        *,
        device: str | torch.device | None = None,
        device_map: str | Mapping[str, Any] | None = None,
        max_memory: Mapping[Any, Any] | int | str | None = None,
        offload_folder: str | Path | None = None,
        dtype: torch.dtype | str | None = None,
        protocol: ProtocolName = "standard",
        routing: Routing = "router",
        tolerance: float | None = None,
        quantization: str | Mapping[str, Any] | None = None,
        trust_remote_code: bool = False,
        verify: bool = False,
    ) -> Self:
        """Load a twin directory and verify its digests.

        Args:
            directory: a directory written by `twin-bench build`.
            device: the device to run on; the CPU by default. `auto` is cuda, else mps, else cpu.
            device_map: several devices in place of one, as transformers takes them: `auto`, or a mapping of the model's
                parts to devices, `cpu` or `disk`. What the experts add is where their layer is, and counts in `auto`.
            max_memory: the largest memory to use, in bytes or as 10GB: of one device a figure (see `limit_memory`), and
                with `device_map` a figure for each device.
            offload_folder: where weights on `disk` are written. Those of safetensors files are read from there.
            dtype: a torch dtype or its name; by default that of the shared expert.
            protocol: standard, paper or routed.
            routing: router, task or none.
            quantization: keep the shared expert in 4bit or 8bit, or as keys of transformers' BitsAndBytesConfig say.
            tolerance: the allowed error of the logits against the exact fusion's, relative to their size, as a root
                mean square over rows. Weights within it that cost less are used (see `twin_bench.twin.tolerance`). By
                default it is a half of the rounding unit, 6e-8 in float32, and an eighth of it in half precision. 0 is
                exact. `paper` ignores it.
            trust_remote_code: let transformers run code that comes with the shared expert.
            verify: read all files for their digests, also those whose digests are remembered from before.

        Raises:
            InputError: no twin is there, or one of a newer format or of another kind than this class; a file is damaged
                or edited; the twin can't serve the protocol or the tolerance; or the devices don't suit.
        """
        from twin_bench.twin.directory import load_twin

        figure = None if isinstance(max_memory, Mapping) else memory_limit(max_memory, device_map)
        each = max_memory if isinstance(max_memory, Mapping) else None
        devices = Devices.of(device_map, each, offload_folder, device=device)
        given: Any = {"dtype": dtype, "devices": devices, "quantization": quantization}
        loaded = load_twin(Path(directory), trust_remote_code=trust_remote_code, anew=verify, **given)
        kind = twin_class(loaded.task_type)
        if not issubclass(kind, cls):
            raise InputError(f"{directory}: a {loaded.task_type} twin, which {cls.__name__} does not serve")
        chosen: Any = {"protocol": protocol, "routing": routing, "tolerance": tolerance}
        twin = kind(loaded.model, loaded.tokenizer, loaded.parts, **chosen)
        twin.limit_memory(figure)
        return twin.to(usable_device(device)) if devices is None else twin

    @property
    def backbone(self) -> Any:
        """The part of the model whose hidden states the router reads."""
        return self.model.base_model

    @torch.no_grad()
    def route(self, input_ids: Tensor, attention_mask: Tensor | None = None, **inputs: Tensor) -> Tensor:
        """Return the router's fusion weights, (batch, experts) in float32. Each row sums to 1.

        A row sums to 0 where the router has a threshold and is less sure: the shared expert answers it. A row's weights
        depend only on its own tokens, and not on padding.

        Args:
            input_ids: (batch, length).
            attention_mask: (batch, length), 0 on padding; None where there is no padding.
            **inputs: the model's other inputs (token_type_ids).

        Raises:
            InputError: the twin has no router for its protocol, an input can't be taken, the batch does not fit into
                `max_memory`, or a weight is not finite.
        """
        given = {"input_ids": input_ids, "attention_mask": attention_mask, **inputs}
        checked = checked_batch(given, self.model)
        self.require_batch(len(input_ids), input_ids.shape[1], 0, Use(shared=True))
        return self._routed_batch(checked)

    def _routed_batch(self, inputs: Mapping[str, Tensor]) -> Tensor:
        router = self._required_router()
        return router.weights(torch.cat(self.features(inputs, router.config.reads), dim=1))

    @torch.no_grad()
    def features(self, inputs: Mapping[str, Tensor], layers: Sequence[int | Read]) -> list[Tensor]:
        """Return the features that a router on each of `layers` reads: (batch, width), of each row's own tokens.

        A layer alone stands for the mean over the tokens (see `Read`).
        """
        reads = reads_of(layers)
        backbone, own, mask = self.backbone, self.router_overrides, inputs.get("attention_mask")
        overrides = {name: tensor.to(backbone.get_parameter(name)) for name, tensor in own.items()}
        with self.fusion.shared():
            states = hidden_states(backbone, inputs, [read.layer for read in reads], overrides=overrides)
        return [pool(state, mask, read.pooling).to(self.device) for state, read in zip(states, reads, strict=True)]

    def encode(self, texts: Sequence[Text], *, max_length: int | None = None) -> list[Encoded]:
        """Tokenise (text, text_pair or None) rows without padding, each truncated to `max_length` tokens.

        A TypeError or an InputError says what is wrong with a row or `max_length`.
        """
        require_texts(texts)
        limit = checked_length(max_length, self)
        return [self.tokenizer(a, b, truncation=True, max_length=limit) for a, b in texts]

    def collate(self, rows: Sequence[Encoded], *, padding_side: str = "right") -> dict[str, Tensor]:
        """Return encoded rows as a forward's inputs: padded to the longest row, on the twin's device."""
        padded = self.tokenizer.pad(alike(rows), padding_side=padding_side, return_tensors="pt")
        return {key: value.to(self.device) for key, value in padded.items()}

    @torch.no_grad()
    def route_all(
        self,
        encoded: Sequence[Encoded],
        tasks: Sequence[str] | None = None,
        *,
        batch_size: int = 32,
        progress: Callable[[int], None] | None = None,
    ) -> Tensor:
        """Return the fusion weights (rows, experts) of encoded rows. Each distinct row is routed once.

        Args:
            encoded: the rows, none empty.
            tasks: the rows' tasks. They are used only where `routing` is `task`.
            batch_size: the largest number of rows in a forward.
            progress: called with the number of rows done since the last call.

        Raises:
            InputError: `routing` is `task` and a row's task is missing or unknown; or a weight is not finite.
        """
        done = 0

        def advance(rows: int) -> None:
            nonlocal done
            done += rows
            if progress:
                progress(rows)

        weights = self._distinct_routed(encoded, tasks, batch_size, advance)
        advance(len(encoded) - done)  # the copies of rows, and rows that no forward was needed for
        return weights

    def _distinct_routed(
        self,
        encoded: Sequence[Encoded],
        tasks: Sequence[str] | None,
        batch_size: int,
        progress: Callable[[int], None],
    ) -> Tensor:
        if self.routing == "task":
            if tasks is None:
                raise InputError("routing=task needs the rows' tasks")
            return one_hot(tasks_of(tasks, len(encoded)), self.expert_names).to(self.device)
        if not encoded or self.routing == "none" or not self.expert_names:
            return torch.zeros(len(encoded), len(self.expert_names), device=self.device)
        router = self._required_router()
        rows, place = distinct(encoded)
        found = self.features_of(rows, router.config.reads, batch_size=batch_size, progress=progress)
        features = torch.cat(found, dim=1)
        numbers = place.new_zeros(len(rows)).scatter_(0, place, torch.arange(len(place)))  # a request of each row
        parts = zip(features.split(batch_size), numbers.split(batch_size), strict=True)
        weights = torch.cat([router.weights(part, own.tolist()) for part, own in parts])
        return self.simplest(weights[place.to(weights.device)])

    @torch.no_grad()
    def features_of(
        self,
        rows: Sequence[Encoded],
        layers: Sequence[int | Read],
        *,
        batch_size: int,
        progress: Callable[[int], None] | None = None,
    ) -> list[Tensor]:
        """Return the features that a router on each of `layers` reads: (rows, width) tensors on the CPU.

        Args:
            rows: at least one encoded row, none empty.
            layers: -1 to the number of blocks, each with its pooling (see `Read`), or alone for the mean.
            batch_size: the largest number of rows in a forward.
            progress: called with the number of rows done since the last call. It is not called for layers whose
                features `feature_cache` holds.
        """

        def compute(missing: Sequence[Read]) -> list[Tensor]:
            return in_order(self._feature_batches(rows, missing, batch_size), progress)

        if self.feature_cache is None:
            return compute(reads_of(layers))
        return kept_features(self.feature_cache, self, rows, reads_of(layers), batch_size, compute)

    def _feature_batches(
        self, rows: Sequence[Encoded], layers: Sequence[int | Read], batch_size: int
    ) -> Iterator[tuple[Sequence[int], list[Tensor]]]:
        """Yield the indices and the features (on each of `layers`) of one batch of rows after the other."""
        lengths = [len(row["input_ids"]) for row in rows]
        everything = Group(tuple(range(len(rows))), torch.zeros(self.fusion.experts))
        for batch in self.shared_batches(everything, lengths, batch_size):
            yield batch.rows, self.features(self.collate([rows[row] for row in batch.rows]), layers)

    @functools.cached_property
    def backbone_digest(self) -> str:
        """The digest of what the router's features depend on. It is taken once, because the parameters never change."""
        return backbone_digest(self.backbone, self.router_overrides, self.digests.get("model", ""))

    def checked_weights(self, weights: Tensor, rows: int) -> Tensor:
        """Return given fusion weights on the CPU, simplified. An error says what is wrong with them."""
        known = weights.cpu() if isinstance(weights, Tensor) and not weights.is_meta else weights
        require_weights(known, rows, self.expert_names)
        return self.simplest(known.to(torch.promote_types(known.dtype, torch.float32)))

    def simplest(self, weights: Tensor) -> Tensor:
        """Return the cheapest fusion weights (rows, experts) whose logits are within the twin's tolerance."""
        return simplified(weights, self.tolerance / self.sensitivity) if self.sensitivity else weights

    def _required_router(self) -> Router:
        if self.router is None:
            raise InputError(
                "this twin has no router for this protocol; give fusion_weights, or build it with router: data"
                + (" that holds each task's validation.jsonl" if self.protocol == "paper" else "")
            )
        return self.router


_KINDS: dict[TaskType, type[TwinModel]] = {}
"""The kinds of twins by what they serve. `twin_bench.twin` imports their modules, which fills this."""


def twin_class(task_type: TaskType) -> type[TwinModel]:
    """Return the class of twins that serves models of `task_type`."""
    return _KINDS[task_type]

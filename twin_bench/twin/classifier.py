"""TwinClassifier: a twin of sequence classifiers. It has a head for each task."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor
from transformers.modeling_outputs import SequenceClassifierOutput

from twin_bench.checkpoints.skeleton import default_max_length
from twin_bench.data.task import TaskType
from twin_bench.errors import InputError, UnsuitedError
from twin_bench.twin.arguments import checked_batch, one_hot, require_count, require_encoded, require_known, tasks_of
from twin_bench.twin.encoded import Encoded, Text, identity
from twin_bench.twin.features import Read
from twin_bench.twin.finite import require_finite_logits
from twin_bench.twin.fusion import Fusion
from twin_bench.twin.going_on import Begun, Start, States, going_on, latest_start
from twin_bench.twin.heads import heads_in_use, install_heads
from twin_bench.twin.layers import install
from twin_bench.twin.model import TwinModel
from twin_bench.twin.paper import at_authors_ranks, with_all_biases
from twin_bench.twin.parts import PaperParts, Parts
from twin_bench.twin.placement import require_in_memory
from twin_bench.twin.plan import Costs, Group


class Prediction(NamedTuple):
    """A classifier's answer for one input: the name of the head, and its logits (labels,), float32 on the CPU.

    `weights` are the input's fusion weights, one for each expert.
    """

    head: str
    logits: Tensor
    weights: tuple[float, ...] = ()


class TwinClassifier(TwinModel):
    """A twin of sequence classifiers.

    The protocol decides which head answers. Under `standard` it is the head of the row's task. Under `routed` it is the
    head of the expert with the largest fusion weight. Under `paper` the head *and all biases* come from the true task's
    expert, as in the authors' evaluation.

    If no expert changes anything below the state that the router reads, the scoring pass goes on from the routing
    pass: see `twin_bench.twin.going_on`.
    """

    task_type: ClassVar[TaskType] = "sequence_classification"

    def _install(self, model: Any, parts: Parts) -> Fusion:
        exclusive, paper = parts.exclusive, parts.paper if self.protocol == "paper" else None
        if paper is not None and paper.density is not None:
            exclusive = at_authors_ranks(exclusive, paper.density)
        return install(model, exclusive if paper is None else with_all_biases(exclusive, paper.left_out))

    def _complete(self, parts: Parts) -> None:
        self.heads = install_heads(self.model, parts.heads)
        self.num_labels = {task: head.num_labels for task, head in self.heads.items()}
        self.max_length = parts.max_length or default_max_length(self.model.config, self.task_type)
        if self.protocol == "routed" and self.router is not None and self.router.config.threshold is not None:
            raise UnsuitedError(
                "protocol routed takes the head from the router, which names none for a row that falls back to the "
                "shared expert; build the twin without fallback"
            )
        if self.protocol == "paper":
            self._use_paper_protocol(parts.paper)

    @torch.no_grad()
    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        *,
        fusion_weights: Tensor | None = None,
        task: str | Sequence[str] | None = None,
    ) -> SequenceClassifierOutput:
        """Run a batch. Each row has its own fusion weights.

        Args:
            input_ids: (batch, length).
            attention_mask: (batch, length), 0 on padding; None where there is no padding.
            token_type_ids: (batch, length), for models that have them.
            fusion_weights: (batch, experts). None asks the router.
            task: the task of all rows, or a sequence with each row's. It names the head and, under `paper`, the biases.
                `routed` does not need it.

        Returns:
            An output whose `logits` are (batch, labels) in the model's dtype. A row whose head has fewer labels than
            the largest head in the batch is filled with -inf.

        Raises:
            TypeError: an argument that is to be a tensor is none.
            InputError: a missing or unknown task; an empty batch, or inputs or fusion weights of another shape, dtype
                or range; a batch that does not fit into `max_memory`; or logits that are not finite.
        """
        given = {"input_ids": input_ids, "attention_mask": attention_mask, "token_type_ids": token_type_ids}
        inputs = checked_batch(given, self.model)
        self.require_batch(len(input_ids), input_ids.shape[1])
        size, states = len(input_ids), None
        tasks = tasks_of(task, size)
        if fusion_weights is not None:
            weights = self.checked_weights(fusion_weights, size)
        elif self.routing == "router" and self.expert_names:
            with self._remembered() as states:
                weights = self.simplest(self._routed_batch(inputs).cpu())
        else:
            weights = self.route_all([{}] * size, [str(name) for name in tasks]).cpu()
        heads = self._heads_of(weights, tasks)
        keys = self._fusion_keys(weights, heads)
        widest = max(self.num_labels[head] for head in heads)
        logits = torch.full((size, widest), -torch.inf, device=self.device, dtype=self.model.dtype)
        for group in self.planned(keys, [input_ids.shape[1]] * size, size):
            rows = torch.tensor(group.rows, device=input_ids.device)
            begun = states.of_batch(rows) if states is not None else None
            batch = {k: v[rows] for k, v in inputs.items()}
            out = self._run(batch, group, keys, [heads[r] for r in group.rows], begun)
            logits[rows, : out.shape[1]] = out
        return SequenceClassifierOutput(logits=logits)

    @torch.no_grad()
    def classify(
        self,
        texts: Sequence[Text],
        tasks: Sequence[str],
        *,
        batch_size: int = 32,
        max_length: int | None = None,
        fusion_weights: Tensor | None = None,
        progress: Callable[[int], None] | None = None,
    ) -> list[Prediction]:
        """Answer a list of requests: `encode` the texts, then `answer` them.

        Args:
            texts: (text, text_pair or None) of each request.
            tasks: the task of each request.
            batch_size: the largest number of rows in a forward.
            max_length: the number of tokens to which a row is truncated; by default what the twin was built with.
            fusion_weights: (requests, experts), used in place of the router's.
            progress: called with the number of steps done since the last call. Each request takes two: it is routed,
                and it is answered.

        Returns:
            A prediction for each request, in order.
        """
        encoded = self.encode(texts, max_length=max_length)
        return self.answer(encoded, tasks, batch_size=batch_size, fusion_weights=fusion_weights, progress=progress)

    @torch.no_grad()
    def answer(
        self,
        encoded: Sequence[Encoded],
        tasks: Sequence[str],
        *,
        batch_size: int = 32,
        fusion_weights: Tensor | None = None,
        progress: Callable[[int], None] | None = None,
    ) -> list[Prediction]:
        """Answer a list of encoded requests: route them, plan, fuse once for each group, run, and restore the order.

        Each distinct input is routed once. It is run once for each task that asks about it. The arguments are those of
        `classify`.

        Raises:
            TypeError: an argument is no list of rows or tasks, or no tensor.
            InputError: an unknown task, a row that the model can't read, fusion weights of another shape or kind, or
                logits that are not finite.
        """
        require_encoded(encoded, self.model.config)
        tasks = tasks_of(tasks, len(encoded))
        require_known(tasks, self.heads, "the twin has no expert of task")
        batch_size, states = require_count(batch_size, "batch_size"), None
        if fusion_weights is not None:
            weights = self.checked_weights(fusion_weights, len(encoded))
            if progress:
                progress(len(encoded))
        else:
            with self._remembered() as states:
                weights = self.route_all(encoded, tasks, batch_size=batch_size, progress=progress).cpu()
        heads = self._heads_of(weights, list(tasks))
        keys = self._fusion_keys(weights, heads)
        used = [tuple(row) for row in weights.tolist()]
        lengths = [len(row["input_ids"]) for row in encoded]
        answers: dict[int, Prediction] = {}
        first: dict[tuple[Any, ...], int] = {}
        copies = [
            first.setdefault((identity(inputs), head, tuple(key)), row)
            for row, (inputs, head, key) in enumerate(zip(encoded, heads, keys.tolist(), strict=True))
        ]
        distinct = sorted(set(copies))
        for batch in self.planned(keys, lengths, batch_size, distinct):
            names = [heads[row] for row in batch.rows]
            own = [encoded[row] for row in batch.rows]
            logits = self._run(self.collate(own), batch, keys, names, states.of(own) if states else None)
            for row, name, row_logits in zip(batch.rows, names, logits.float().cpu(), strict=True):
                answers[row] = Prediction(name, row_logits[: self.num_labels[name]], used[row])
            if progress:
                progress(len(batch.rows))
        if progress and len(copies) > len(distinct):
            progress(len(copies) - len(distinct))
        return [answers[row] for row in copies]

    def probe(self, encoded: Sequence[Encoded], tasks: Sequence[str], weights: Tensor) -> list[Tensor]:
        """Return the logits that each row's answer is read from: (labels,) each, on the CPU."""
        return [prediction.logits for prediction in self.answer(encoded, tasks, fusion_weights=weights)]

    def _run(
        self,
        inputs: Mapping[str, Tensor],
        group: Group,
        keys: Tensor,
        heads: Sequence[str],
        begun: Begun | None = None,
    ) -> Tensor:
        """Return the logits of one batch of a plan over `keys`. `begun` is the routing pass's state of the rows."""
        with self.fused(group, keys), heads_in_use(self.heads, heads, self.device), self._from(begun):
            logits: Tensor = self.model(**inputs).logits
        labels = torch.tensor([self.num_labels[head] for head in heads], device=logits.device)
        filled = torch.arange(logits.shape[1], device=logits.device) >= labels[:, None]
        own = logits.masked_fill(filled, 0)
        require_finite_logits(own, group.rows, keys, self.expert_names, self.model.dtype)
        return logits

    @functools.cached_property
    def _start(self) -> Start:
        with self.fusion.shared():
            return latest_start(self.backbone)

    def _remembered(self) -> AbstractContextManager[States | None]:
        """Return a context that keeps a state which the router reads, if the scoring pass can go on from it."""
        if self.router is None or self.router_overrides or self.routing != "router":
            return nullcontext()
        above = [read.layer for read in self.router.config.reads if read.layer > 0]
        layer = max((layer for layer in above if layer <= self._start.layer), default=0) if above else 0
        return States(layer).remembered() if layer else nullcontext()

    @torch.no_grad()
    def features(self, inputs: Mapping[str, Tensor], layers: Sequence[int | Read]) -> list[Tensor]:
        """Return the features that a router on each of `layers` reads: (batch, width), of each row's own tokens."""
        if (states := States.current()) is None:
            return super().features(inputs, layers)
        with self.fusion.shared(), states.seen(self.backbone):
            return super().features(inputs, layers)

    def _feature_batches(
        self, rows: Sequence[Encoded], layers: Sequence[int | Read], batch_size: int
    ) -> Iterator[tuple[Sequence[int], list[Tensor]]]:
        for batch, features in super()._feature_batches(rows, layers, batch_size):
            if (states := States.current()) is not None:
                states.keep([rows[row] for row in batch])
            yield batch, features

    def _from(self, begun: Begun | None) -> AbstractContextManager[None]:
        """Return a context in which the model goes on from a state of the routing pass, if there is one."""
        return nullcontext() if begun is None else going_on(self.backbone, self._start, begun)

    def _fusion_keys(self, weights: Tensor, heads: Sequence[str]) -> Tensor:
        """Return what decides each row's fused model: its fusion weights and, under `paper`, its biases' weights."""
        if self.protocol != "paper" or not self.expert_names:
            return weights
        return torch.cat([weights, one_hot(heads, self.expert_names).to(weights)], dim=1)

    @functools.cached_property
    def costs(self) -> Costs:
        """The costs that the planner compares. Under `paper` a row's biases add keys that cost nothing."""
        costs = super().costs
        if self.protocol != "paper":
            return costs
        free = [0.0] * len(costs.fuse)
        return replace(costs, fuse=(*costs.fuse, *free), columns=(*costs.columns, *free))

    def _heads_of(self, weights: Tensor, tasks: Sequence[str | None]) -> list[str]:
        if self.protocol == "routed":
            if not self.expert_names:
                raise InputError("protocol routed takes the head from a router, and a static merge has none")
            return [self.expert_names[index] for index in weights.argmax(dim=1).tolist()]
        named = [task for task in tasks if task is not None]
        if len(named) < len(tasks):
            raise InputError(f"protocol {self.protocol} takes the head from the task: name it with task=")
        require_known(named, self.heads, "the twin has no expert of task")
        return named

    def _use_paper_protocol(self, paper: PaperParts | None) -> None:
        if paper is None:
            if self.expert_names:
                raise InputError("this twin was built without what the paper protocol needs; build it again")
            return
        require_in_memory(self.model)
        prefix = f"{self.model.base_model_prefix}."
        self.router_overrides = {name.removeprefix(prefix): bias for name, bias in paper.biases.items()}
        self.router = paper.router

"""TwinModel: a Hugging Face model, its experts' exclusive vectors, a router, and a head for each task."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import SequenceClassifierOutput

from twin_bench.errors import InputError, nearest
from twin_bench.twin.exclusive import Exclusive
from twin_bench.twin.features import hidden_states, pool
from twin_bench.twin.fusion import Fusion, install
from twin_bench.twin.heads import heads_in_use, install_heads
from twin_bench.twin.plan import Costs, Group, batches, plan
from twin_bench.twin.router import Router

Protocol = Literal["standard", "paper", "routed"]
PROTOCOLS: tuple[Protocol, ...] = ("standard", "paper", "routed")
Routing = Literal["router", "task", "none"]
ROUTINGS: tuple[Routing, ...] = ("router", "task", "none")
Text = tuple[str, str | None]
Encoded = Mapping[str, list[int]]


@dataclass(frozen=True)
class PaperParts:
    """What only the authors' protocol needs.

    The pretrained biases, with which their router's features are taken, and, where test rows were given to
    select it, that router.
    """

    biases: Mapping[str, Tensor]
    router: Router | None


@dataclass(frozen=True)
class Parts:
    """A twin without its shared expert: what TwinModel adds to a Hugging Face model.

    A static merge is a twin with heads and no exclusive vectors.
    """

    heads: Mapping[str, Mapping[str, Tensor]]
    exclusive: Mapping[str, Exclusive] = field(default_factory=dict)
    router: Router | None = None
    paper: PaperParts | None = None
    digests: Mapping[str, str] = field(default_factory=dict)


class Prediction(NamedTuple):
    """A classifier's answer for one input: the head that gave it and its logits, (labels,) float32 on the CPU."""

    head: str
    logits: Tensor


class TwinModel(nn.Module):
    """theta_s + sum_t w_t(x) v_t for every row of a batch, exactly.

    Protocols: `standard` takes the head from the row's task; `routed` from the largest fusion weight;
    `paper` takes head *and all biases* from the true task's expert, as the authors' evaluation does.

    Routing says where weights come from that are not given: the `router`; the true `task` (its exclusive
    vector alone, the ceiling of any router; a score under it was told the task); or `none`, theta_s alone.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        parts: Parts,
        *,
        protocol: Protocol = "standard",
        routing: Routing = "router",
    ) -> None:
        """Make a twin of `model`, a transformers model that holds the shared expert (changed in place)."""
        super().__init__()
        if protocol not in PROTOCOLS:
            raise InputError(f"unknown protocol {protocol!r}{nearest(protocol, PROTOCOLS)}")
        if routing not in ROUTINGS:
            raise InputError(f"unknown routing {routing!r}{nearest(routing, ROUTINGS)}")
        if protocol == "routed" and routing != "router":
            raise InputError(f"protocol routed takes the head from the router, and routing is {routing}")
        self.protocol: Protocol = protocol
        self.routing: Routing = routing
        self.tokenizer = tokenizer
        self.expert_names = tuple(parts.exclusive)
        self.digests = dict(parts.digests)
        self.fusion: Fusion = install(model, parts.exclusive)
        self.model = model
        self.heads = install_heads(model, parts.heads)
        self.num_labels = {task: head.num_labels for task, head in self.heads.items()}
        self.router = parts.router
        self._paper_biases: dict[str, Tensor] = {}
        if protocol == "paper":
            self._use_paper_protocol(parts.paper)
        self.requires_grad_(False)
        self.eval()

    @classmethod
    def from_pretrained(
        cls,
        directory: str | Path,
        *,
        device: str | torch.device | None = None,
        dtype: torch.dtype | str | None = None,
        protocol: Protocol = "standard",
        routing: Routing = "router",
        trust_remote_code: bool = False,
    ) -> TwinModel:
        """Load a twin directory, its digests verified.

        Args:
            directory: written by `twin-bench build`.
            device: where it runs; the CPU by default.
            dtype: a torch dtype or its name; by default that of the shared expert.
            protocol: standard, paper or routed.
            routing: router, task or none.
            trust_remote_code: let transformers run code that comes with the shared expert.

        Raises:
            InputError: no twin there, a newer format, a damaged or edited file, a protocol it can't serve.
        """
        from twin_bench.twin.directory import load_twin

        model, tokenizer, parts = load_twin(Path(directory), dtype=dtype, trust_remote_code=trust_remote_code)
        return cls(model, tokenizer, parts, protocol=protocol, routing=routing).to(device or "cpu")

    @property
    def device(self) -> torch.device:
        """Where the shared expert's parameters are."""
        device: torch.device = self.model.device
        return device

    @torch.no_grad()
    def route(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, token_type_ids: Tensor | None = None
    ) -> Tensor:
        """Return the router's fusion weights, (batch, experts) in float32, rows summing to 1.

        A row's weights depend on its own tokens alone: padding does not count.
        """
        if self.router is None:
            raise InputError(
                "this twin has no router for this protocol; give fusion_weights, or build it with router: data"
                + (" that holds each task's validation.jsonl" if self.protocol == "paper" else "")
            )
        inputs = _inputs(input_ids, attention_mask, token_type_ids)
        features = self.features(inputs, [self.router.config.layer])[0]
        return self.router.weights(features)

    @torch.no_grad()
    def features(self, inputs: Mapping[str, Tensor], layers: Sequence[int]) -> list[Tensor]:
        """Return what a router on each of `layers` reads: (batch, width) means over the tokens of a batch."""
        biases = {name: bias.to(self.device, self.model.dtype) for name, bias in self._paper_biases.items()}
        states = hidden_states(self.model, inputs, layers, overrides=biases)
        return [pool(state, inputs.get("attention_mask")) for state in states]

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
        """Run a batch, each row with its own weights.

        Args:
            input_ids: (batch, length).
            attention_mask: likewise, 0 on padding.
            token_type_ids: likewise, where the model has them.
            fusion_weights: (batch, experts); None asks the router.
            task: the task of all rows, or of each: whose head (and under `paper` whose biases) it takes.
                Under `routed` it may be left out: the head is that of the largest weight.

        Returns:
            An output whose `logits` are (batch, labels). Rows whose head has fewer labels than the widest
            in the batch are filled with -inf.
        """
        size = len(input_ids)
        tasks = [task] * size if task is None or isinstance(task, str) else list(task)
        if fusion_weights is not None:
            weights = self._checked(fusion_weights, size)
        elif self.routing == "router" and self.expert_names:
            weights = self.route(input_ids, attention_mask, token_type_ids)
        else:
            weights = self.route_all([{}] * size, [str(name) for name in tasks])
        heads = self._heads_of(weights, tasks)
        keys = self._fusion_keys(weights, heads)
        inputs = _inputs(input_ids, attention_mask, token_type_ids)
        groups = plan(keys, [input_ids.shape[1]] * size, self._costs)
        widest = max(self.num_labels[head] for head in heads)
        logits = torch.full((size, widest), -torch.inf, device=self.device, dtype=self.model.dtype)
        for group in groups:
            rows = torch.tensor(group.rows, device=input_ids.device)
            out = self._run({k: v[rows] for k, v in inputs.items()}, group, keys, [heads[r] for r in group.rows])
            logits[rows, : out.shape[1]] = out
        return SequenceClassifierOutput(logits=logits)

    @torch.no_grad()
    def classify(
        self,
        texts: Sequence[Text],
        tasks: Sequence[str],
        *,
        batch_size: int = 32,
        max_length: int = 128,
        fusion_weights: Tensor | None = None,
        progress: Callable[[int], None] | None = None,
    ) -> list[Prediction]:
        """Answer a list of requests: `encode` the texts to `max_length` tokens, then `answer` them.

        Args:
            texts: (text, text_pair or None) of each request.
            tasks: the task of each.
            batch_size: rows a forward.
            max_length: tokens a row; longer ones are truncated.
            fusion_weights: (requests, experts), in place of the router's.
            progress: called with the number of requests done since the last call.
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
        """Answer encoded requests as a whole: route, plan, fuse once a group, run, restore the order.

        Each distinct input is routed once, and run once for each task that asks about it. Arguments as for
        `classify`.
        """
        _require_known(tasks, self.heads, "the twin has no expert of task")
        if fusion_weights is not None:
            weights = self._checked(fusion_weights, len(encoded))
        else:
            weights = self.route_all(encoded, tasks, batch_size=batch_size)
        heads = self._heads_of(weights, list(tasks))
        keys = self._fusion_keys(weights, heads)
        lengths = [len(row["input_ids"]) for row in encoded]
        answers: dict[int, Prediction] = {}
        first: dict[tuple[Any, ...], int] = {}
        copies = [
            first.setdefault((_identity(inputs), head, tuple(key)), row)
            for row, (inputs, head, key) in enumerate(zip(encoded, heads, keys.tolist(), strict=True))
        ]
        distinct = sorted(set(copies))
        for group in plan(keys[distinct], [lengths[row] for row in distinct], self._costs):
            whole = Group(tuple(distinct[row] for row in group.rows), group.weights)
            for batch in batches(whole, lengths, batch_size):
                names = [heads[row] for row in batch.rows]
                logits = self._run(self.collate([encoded[row] for row in batch.rows]), batch, keys, names)
                for row, name, row_logits in zip(batch.rows, names, logits.float().cpu(), strict=True):
                    answers[row] = Prediction(name, row_logits[: self.num_labels[name]])
                if progress:
                    progress(len(batch.rows))
        if progress and len(copies) > len(distinct):
            progress(len(copies) - len(distinct))
        return [answers[row] for row in copies]

    def encode(self, texts: Sequence[Text], *, max_length: int) -> list[Encoded]:
        """Tokenise (text, text_pair or None) rows, truncated to `max_length`, without padding."""
        return [self.tokenizer(a, b, truncation=True, max_length=max_length) for a, b in texts]

    @torch.no_grad()
    def route_all(self, encoded: Sequence[Encoded], tasks: Sequence[str], *, batch_size: int = 32) -> Tensor:
        """Return the fusion weights (rows, experts) of encoded rows, each distinct row routed once.

        `tasks` are looked at only where `routing` is `task`.
        """
        if self.routing == "task":
            return self._one_hot(tasks)
        weights = torch.zeros(len(encoded), len(self.expert_names), device=self.device)
        if self.routing == "none" or not self.expert_names:
            return weights
        distinct: dict[tuple[int, ...], list[int]] = {}
        for index, row in enumerate(encoded):
            distinct.setdefault(_identity(row), []).append(index)
        groups = list(distinct.values())
        for chunk in batches(
            Group(tuple(range(len(groups))), None),
            [len(encoded[g[0]]["input_ids"]) for g in groups],
            batch_size,
        ):
            routed = self.route(**self.collate([encoded[groups[g][0]] for g in chunk.rows]))
            for g, row_weights in zip(chunk.rows, routed, strict=True):
                weights[groups[g]] = row_weights
        return weights

    def _run(self, inputs: Mapping[str, Tensor], group: Group, keys: Tensor, heads: Sequence[str]) -> Tensor:
        """Return the logits of one batch of a plan, whose rows index `keys`."""
        if group.weights is not None:
            fused = self.fusion.fuse(*self._split(group.weights))
        else:
            fused = self.fusion.per_row(*self._split(keys[list(group.rows)]))
        with fused, heads_in_use(self.heads, heads):
            logits: Tensor = self.model(**inputs).logits
        return logits

    def _fusion_keys(self, weights: Tensor, heads: Sequence[str]) -> Tensor:
        """Return what decides a row's fused model: its weights and, under `paper`, its biases' weights as well."""
        if self.protocol != "paper" or not self.expert_names:
            return weights
        return torch.cat([weights, self._one_hot(heads).to(weights)], dim=1)

    def _one_hot(self, tasks: Sequence[str]) -> Tensor:
        """Return weight 1 on each row's own expert, (rows, experts)."""
        _require_known(tasks, self.expert_names, "the twin has no expert of task")
        owner = torch.tensor([self.expert_names.index(task) for task in tasks], device=self.device)
        return nn.functional.one_hot(owner, len(self.expert_names)).float()

    def _split(self, keys: Tensor) -> tuple[Tensor, Tensor]:
        experts = len(self.expert_names)
        return keys[..., :experts], keys[..., -experts:] if experts else keys

    @functools.cached_property
    def _costs(self) -> Costs:
        costs = self.fusion.costs()
        if self.protocol != "paper":
            return costs
        return Costs((*costs.fuse, *[0.0] * len(costs.fuse)), costs.rebuild, costs.low_rank)

    def _heads_of(self, weights: Tensor, tasks: Sequence[str | None]) -> list[str]:
        if self.protocol == "routed":
            if not self.expert_names:
                raise InputError("protocol routed takes the head from a router, and a static merge has none")
            return [self.expert_names[index] for index in weights.argmax(dim=1).tolist()]
        if len(tasks) != len(weights):
            raise InputError(f"{len(tasks)} tasks for {len(weights)} rows; give one task, or one a row")
        named = [task for task in tasks if task is not None]
        if len(named) < len(tasks):
            raise InputError(f"protocol {self.protocol} takes the head from the task: name it with task=")
        _require_known(named, self.heads, "the twin has no expert of task")
        return named

    def _checked(self, weights: Tensor, rows: int) -> Tensor:
        expected = (rows, len(self.expert_names))
        if tuple(weights.shape) != expected:
            raise InputError(f"fusion_weights is {tuple(weights.shape)}, not (rows, experts) = {expected}")
        return weights.to(self.device, torch.promote_types(weights.dtype, torch.float32))

    def collate(self, rows: Sequence[Encoded]) -> dict[str, Tensor]:
        """Pad encoded rows to their longest and move them to the device: what a forward takes."""
        padded = self.tokenizer.pad([dict(row) for row in rows], return_tensors="pt")
        return {key: value.to(self.device) for key, value in padded.items()}

    def _use_paper_protocol(self, paper: PaperParts | None) -> None:
        if paper is None:
            if self.expert_names:
                raise InputError("this twin was built without what the paper protocol needs; build it again")
            return
        self._paper_biases = {
            name.removeprefix(f"{self.model.base_model_prefix}."): tensor for name, tensor in paper.biases.items()
        }
        self.router = paper.router


def _inputs(input_ids: Tensor, attention_mask: Tensor | None, token_type_ids: Tensor | None) -> dict[str, Tensor]:
    given = {"input_ids": input_ids, "attention_mask": attention_mask, "token_type_ids": token_type_ids}
    return {name: tensor for name, tensor in given.items() if tensor is not None}


def _identity(encoded: Encoded) -> tuple[int, ...]:
    """Return what two encoded inputs have in common if and only if they are the same input."""
    return (*encoded["input_ids"], *encoded.get("token_type_ids", ()))


def _require_known(tasks: Sequence[str], known: Any, message: str) -> None:
    for task in tasks:
        if task not in known:
            raise InputError(f"{message} {task!r}{nearest(task, known)}")

"""Making a twin's routers: rows, features, the choice of what is read, and the twin's sensitivity."""

from __future__ import annotations

import copy
import functools
import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from rich.progress import Progress, TaskID
from torch import Tensor

from twin_bench.checkpoints.finite import all_finite
from twin_bench.checkpoints.sources import Sources, load_model
from twin_bench.data.rows import RouterRows
from twin_bench.data.task import TaskInput
from twin_bench.errors import InputError
from twin_bench.files import digest, digest_tensors
from twin_bench.protocols import ProtocolName
from twin_bench.twin.cache import surroundings
from twin_bench.twin.classifier import TwinClassifier
from twin_bench.twin.encoded import Encoded, distinct, identity
from twin_bench.twin.exclusive import Exclusive
from twin_bench.twin.features import POOLINGS, Read
from twin_bench.twin.model import TwinModel, twin_class
from twin_bench.twin.parts import Parts
from twin_bench.twin.recipe import Recipe, RouterSettings
from twin_bench.twin.routers.base import Examples, Router, RouterConfig
from twin_bench.twin.routers.calibration import calibrate, report, set_threshold
from twin_bench.twin.routers.choice import as_text, cheapest, ridge_accuracy
from twin_bench.twin.routers.directions import reading_directions
from twin_bench.twin.routers.kinds.mlp import LONGEST, train_router
from twin_bench.twin.routers.registry import find_kind
from twin_bench.twin.routers.rows import Divided, divided
from twin_bench.twin.routers.store import kept_router
from twin_bench.twin.routers.task_loss import (
    CHOOSING_ROWS,
    ROWS,
    answered,
    require_answers,
    trained_on_task_loss,
)
from twin_bench.twin.tolerance import sensitivity

PROBE_ROWS = 16
PROBE_TOKENS = 512
"""The largest number of held-out rows of a task, and of tokens in them, on which a twin's sensitivity is measured.

At least one row of each task is used, however long it is.
"""

FEATURE_TOKENS = 8192
"""The largest number of tokens in a batch for features. It bounds the memory of the hidden states of long prompts."""

PAPER_TEST_ROWS = 1000
"""The largest number of test rows of a task on which the authors' code selects its router."""


@dataclass(frozen=True)
class RouterTraining:
    """What is needed to train the routers of a twin: its recipe, its parts so far, and rows.

    `shared` holds the shared expert's parameters. `given` are all rows that may be used, and `rows` the sample of the
    training rows that is. `feature_cache` is the directory in which features and routers are kept from run to run, or
    None. `device` is where features are computed, and `batch_size` the largest number of rows in a forward pass, if it
    is given. `answers` are expected of labelled rows, where the router is trained on them.
    """

    recipe: Recipe
    settings: RouterSettings
    sources: Sources
    shared: Mapping[str, Tensor]
    parts: Parts
    given: RouterRows
    feature_cache: Path | None
    progress: Progress
    device: torch.device
    batch_size: int | None = None
    rows: Sequence[TaskInput] = ()
    answers: Mapping[TaskInput, Sequence[Any]] = field(default_factory=dict)

    @property
    def experts(self) -> tuple[str, ...]:
        """The experts' names, in the order of the weights' columns."""
        return tuple(self.recipe.experts)

    @property
    def trains_on(self) -> torch.device:
        """Where the steps of a router's training run: on a GPU of CUDA's, else on the CPU."""
        return self.device if self.device.type == "cuda" else torch.device("cpu")

    def twin(self, protocol: ProtocolName = "standard") -> TwinModel:
        """Return the twin without a router, in the recipe's dtype."""
        model = load_model(self.sources, self.shared, self.recipe.dtype, self.recipe.quantization)
        kind = twin_class(self.sources.skeleton.task_type)
        twin = kind(model, self.sources.tokenizer, self.parts, protocol=protocol)
        twin.feature_cache = self.feature_cache
        return twin.to(self.device)

    def owners(self, rows: Sequence[TaskInput]) -> Tensor:
        """Return the index (rows,) of each row's expert, the label that a router is trained on."""
        return torch.tensor([self.experts.index(row.task) for row in rows])


def train_routers(training: RouterTraining) -> tuple[Parts, dict[str, Any]]:
    """Return the twin's parts with its routers and the twin's sensitivity, and a summary of the choices.

    All that is chosen about the router is chosen on held-out training rows, and what is told about it is measured on
    others. If the twin can run under the protocol paper and the data holds test rows, a second router is trained as the
    authors do.
    """
    settings, seed = training.settings, training.recipe.seed
    parted = divided(
        training.given.train, training.experts, limit=settings.max_rows, held_out=settings.held_out, seed=seed
    )
    training = replace(training, rows=parted.rows)
    twin = training.twin()
    if settings.objective == "task_loss":
        training = replace(training, answers=training.given.answers())
        require_answers(training.answers, training.experts)
    router, told = _kept(training, twin, parted, lambda: _chosen_router(training, twin, parted))
    twin.router = copy.deepcopy(router).to(training.device)
    probes = [row for row, out in zip(parted.rows, parted.held_out, strict=True) if out]
    parts = replace(training.parts, router=router, sensitivity=_sensitivity(twin, probes))
    summary = {**settings.model_dump(exclude={"data"}), **told}
    if settings.paper and parts.paper is not None:
        test_rows = training.given.test(min(settings.max_rows, PAPER_TEST_ROWS))
        if test_rows:
            paper, summary["paper"] = _paper_router(replace(training, parts=parts), test_rows)
            parts = replace(parts, paper=replace(parts.paper, router=paper))
    return parts, summary


def _kept(
    training: RouterTraining,
    twin: TwinModel,
    parted: Divided,
    fit: Callable[[], tuple[Router, dict[str, Any]]],
) -> tuple[Router, dict[str, Any]]:
    """Return what `fit` returns, or what it returned in an earlier build on the same shared expert and rows."""
    if training.feature_cache is None:
        return fit()
    kind = find_kind(training.settings.kind)
    labels = sorted(digest([*row, *answers]) for row, answers in training.answers.items())
    read = kind.router.reads_experts or bool(labels)
    exclusive = [_tensors_of(own) for own in training.parts.exclusive.values()] if read else []
    heads = training.parts.heads.values() if labels else ()
    encoded = twin.encode([(row.text, row.text_pair) for row in parted.rows])
    decisive = {
        **surroundings(training.device),
        "kind": kind.identity,
        "settings": training.settings.model_dump(mode="json", exclude={"data", "paper"}),
        "seed": training.recipe.seed,
        "protocol": twin.protocol,
        "experts": training.experts,
        "answers": digest(labels),
        "parts": [digest_tensors(own) for own in (*exclusive, *heads)],
        "backbone": twin.backbone_digest,
        "dtype": str(twin.model.dtype),
        "rows": digest([(identity(one).hex(), row.task) for one, row in zip(encoded, parted.rows, strict=True)]),
        "held_out": digest([parted.choosing.tolist(), parted.reporting.tolist()]),
        "batch_size": training.batch_size,
    }
    return kept_router(training.feature_cache, decisive, fit)


def _tensors_of(exclusive: Exclusive) -> dict[str, Tensor]:
    """Return all tensors of an exclusive vector by name."""
    factors = {f"{n}.{side}": getattr(f, side) for n, f in exclusive.factors.items() for side in ("A", "B")}
    entries = {f"{n}.{part}": tensor for n, one in exclusive.sparse.items() for part, tensor in one.parts.items()}
    return {**factors, **entries, **exclusive.vectors}


def _chosen_router(training: RouterTraining, twin: TwinModel, parted: Divided) -> tuple[Router, dict[str, Any]]:
    """Return the router of the recipe, on the layer that is given or chosen, and a summary of it."""
    settings, progress = training.settings, training.progress
    kind, depth = find_kind(settings.kind), training.sources.config.num_hidden_layers
    reads = _candidates(training, depth)
    features = dict(zip(reads, _features(training, twin, training.rows, reads), strict=True))
    fits = _Fits(training, twin, parted, features)
    accuracy: dict[Read, float] = {}
    wanted = tuple(reads)
    if "auto" in (settings.layer, settings.pooling):
        accuracy = {read: fits.probe((read,)) for read in progress.track(reads, description="router: layers")}
        wanted = (cheapest(accuracy, int(parted.choosing.sum()), depth),)
    examples = fits.examples(wanted, _bar(progress, f"router: {kind.name}"))
    router = kind.fit(fits.config(wanted), examples, settings.options)
    if settings.temperature == "auto":
        calibrate(router, examples.held_out, examples.held_out_owners)
    if training.answers:  # after the temperature, which task ids decide
        router = _on_task_loss(fits, wanted, router)
    if settings.fallback:
        set_threshold(router, examples.held_out, keep=settings.keep)
    told = {
        **_summary(router, len(examples.features), "held-out training rows", len(examples.held_out)),
        **report(router, *fits.reporting(wanted)),
        "reported_on": parted.reported_on,
        "report_rows": int(parted.reporting.sum()),
        "layer_accuracy": {as_text(read): value for read, value in accuracy.items()},
    }
    return router, told


def _bar(progress: Progress, description: str) -> Callable[[int], None]:
    """Return what is called after each epoch. The bar appears with the first one: not every fit has epochs."""
    bar: list[TaskID] = []

    def advance(epochs: int) -> None:
        if not bar:
            bar.append(progress.add_task(description, total=epochs))
        progress.advance(bar[0])

    return advance


@dataclass(frozen=True)
class _Fits:
    """The fits of a recipe's router on the features (rows, width) of several reads."""

    training: RouterTraining
    twin: TwinModel
    parted: Divided
    features: Mapping[Read, Tensor]

    def config(self, reads: tuple[Read, ...]) -> RouterConfig:
        """Return the config of a router on these reads, before its calibration."""
        settings, depth = self.training.settings, self.training.sources.config.num_hidden_layers
        layers = tuple(read.layer for read in reads)
        return RouterConfig(
            experts=self.training.experts,
            width=sum(self.features[read].shape[1] for read in reads),
            layer=max(layers, key=lambda layer: depth if layer == -1 else layer),
            top_k=settings.top_k,
            temperature=1.0 if settings.temperature == "auto" else settings.temperature,
            kind=settings.kind,
            layers=layers if len(layers) > 1 else (),
            pooling=reads[0].pooling,
        )

    def examples(self, reads: tuple[Read, ...], advance: Callable[[int], None] = lambda epochs: None) -> Examples:
        """Return what a router on these reads is made from."""
        training, parted = self.training, self.parted
        hidden, owner = self._read(reads)
        fitting = ~parted.held_out
        rows = (hidden[fitting], owner[fitting], hidden[parted.choosing], owner[parted.choosing])
        directions = functools.partial(reading_directions, self.twin, training.parts.exclusive, reads[0].layer)
        return Examples(*rows, training.settings.passes, training.recipe.seed, directions, advance, training.trains_on)

    def reporting(self, reads: tuple[Read, ...]) -> tuple[Tensor, Tensor]:
        """Return the features (rows, width) and the owners (rows,) of the rows that the router is reported on."""
        hidden, owner = self._read(reads)
        return hidden[self.parted.reporting], owner[self.parted.reporting]

    def _read(self, reads: tuple[Read, ...]) -> tuple[Tensor, Tensor]:
        hidden = torch.cat([self.features[read] for read in reads], dim=1)
        return hidden, self.training.owners(self.training.rows)

    def probe(self, reads: tuple[Read, ...]) -> float:
        """Return the accuracy on held-out rows: of ridge regression in place of a router that takes long to train."""
        settings, examples = self.training.settings, self.examples(reads)
        kind = find_kind(settings.kind)
        if kind.router.trains:
            return ridge_accuracy(examples, len(self.training.experts))
        router = kind.fit(self.config(reads), examples, settings.options)
        return (router(examples.held_out).argmax(dim=1) == examples.held_out_owners).double().mean().item()


def _on_task_loss(fits: _Fits, reads: tuple[Read, ...], router: Router) -> Router:
    """Return the router, trained on the loss of the fused model's answers."""
    training, twin = fits.training, fits.twin
    assert isinstance(twin, TwinClassifier)
    hidden = torch.cat([fits.features[read] for read in reads], dim=1)
    parts = [
        answered(twin, training.rows, hidden, mask, training.answers, limit)
        for mask, limit in ((~fits.parted.held_out, ROWS), (fits.parted.choosing, CHOOSING_ROWS))
    ]
    advance = _bar(training.progress, "router: task loss")
    return trained_on_task_loss(router, twin, *parts, seed=training.recipe.seed, advance=advance)


def _candidates(training: RouterTraining, depth: int) -> list[Read]:
    """Return what the recipe's router reads, or may read. One that reads exclusive vectors needs them a block above."""
    settings, causal = training.settings, training.sources.skeleton.task_type == "causal_lm"
    poolings = (settings.pooling,) if settings.pooling != "auto" else ("mean", "last") if causal else POOLINGS
    changed = range(training.recipe.exclusive.from_layer or 0, depth)
    every = changed if find_kind(settings.kind).router.reads_experts else range(depth + 1)
    layers = tuple(every) if settings.layer == "auto" else settings.layers or (settings.layer,)
    return [Read(layer, pooling) for layer in layers for pooling in poolings]


def _paper_router(training: RouterTraining, test_rows: Sequence[TaskInput]) -> tuple[Router, dict[str, Any]]:
    """Train a router as the authors do, and return it with a summary.

    It reads the last layer of the shared expert with the pretrained biases, and its epoch is chosen on the test rows.
    """
    epochs = training.settings.passes or LONGEST
    settings = RouterSettings(data="", epochs=epochs, max_rows=training.settings.max_rows)
    training = replace(training, settings=settings, answers={})
    twin = training.twin("paper")
    both = [*training.rows, *test_rows]
    tested = torch.arange(len(both)) >= len(training.rows)
    parted = Divided(both, tested, tested)

    def fit() -> tuple[Router, dict[str, Any]]:
        hidden = _features(training, twin, both, [Read(-1)], "router features (paper)")[0]
        owner = training.owners(both)
        trained = train_router(
            RouterConfig(training.experts, hidden.shape[1]),
            *(hidden[~tested], owner[~tested], hidden[tested], owner[tested]),
            epochs=epochs,
            seed=training.recipe.seed,
            advance=_bar(training.progress, "router (paper)"),
            device=training.trains_on,
        )
        trained.router.notes = {"epoch": trained.epoch}
        told = {
            **_summary(trained.router, trained.rows, "test rows, as the authors do", len(test_rows)),
            **report(trained.router, hidden[tested], owner[tested]),
            "reported_on": parted.reported_on,
            "report_rows": len(test_rows),
        }
        return trained.router, told

    return _kept(training, twin, parted, fit)


def _features(
    training: RouterTraining,
    twin: TwinModel,
    rows: Sequence[TaskInput],
    reads: Sequence[Read],
    description: str = "router features",
) -> list[Tensor]:
    """Return the features (rows, width) of each read, in float32 on the CPU."""
    encoded = twin.encode([(row.text, row.text_pair) for row in rows])
    lengths = [len(row["input_ids"]) for row in encoded]
    if not all(lengths):
        raise InputError(
            f"router: the tokenizer makes no token of a row of {rows[lengths.index(0)].task}; correct or remove the row"
        )
    distinct_rows, place = distinct(encoded)
    progress, fitting = training.progress, max(1, min(64, FEATURE_TOKENS // max(lengths)))
    bar = progress.add_task(description, total=len(distinct_rows))
    features = twin.features_of(
        distinct_rows,
        reads,
        batch_size=training.batch_size or fitting,
        progress=lambda done: progress.advance(bar, done),
    )
    progress.update(bar, completed=len(distinct_rows))
    for read, hidden in zip(reads, features, strict=True):
        if not all_finite(hidden):
            bad = (~torch.isfinite(hidden)).any(dim=1)[place].nonzero()[0]
            raise InputError(
                f"router: the model's hidden state on layer {read.layer} is not finite for a row of "
                f"{rows[int(bad)].task}; set dtype: float32 or bfloat16, or check the experts"
            )
    return [hidden.float()[place] for hidden in features]


def _sensitivity(twin: TwinModel, rows: Sequence[TaskInput]) -> float:
    """Return the twin's sensitivity to its weights (see `twin_bench.twin.tolerance`), from a few rows of each task."""
    probes: list[Encoded] = []
    tasks: list[str] = []
    for task in twin.expert_names:
        own = twin.encode([(row.text, row.text_pair) for row in rows if row.task == task][:PROBE_ROWS])
        tokens = list(itertools.accumulate(len(row["input_ids"]) for row in own))
        few = max(1, sum(count <= PROBE_TOKENS for count in tokens))
        probes += own[:few]
        tasks += [task] * len(own[:few])
    return sensitivity(twin, probes, tasks, twin.route_all(probes))


def _summary(router: Router, rows: int, selected_on: str, selection_rows: int) -> dict[str, Any]:
    """Return what twin.json says of how a router was made: on how many rows, and what chose it."""
    return {
        "layer": router.config.layer,
        "pooling": router.config.pooling,
        "temperature": router.config.temperature,
        "threshold": router.config.threshold,
        "selected_on": selected_on,
        **router.notes,
        "rows": rows,
        "selection_rows": selection_rows,
    }

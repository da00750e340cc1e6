"""Training a twin's routers: rows, features, the choice of layer and epoch, and the twin's sensitivity."""

from __future__ import annotations

import copy
import itertools
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.progress import Progress
from torch import Tensor

from twin_bench.checkpoints.finite import all_finite
from twin_bench.checkpoints.sources import Sources, load_model
from twin_bench.data.rows import RouterRows
from twin_bench.data.task import TaskInput
from twin_bench.errors import InputError
from twin_bench.protocols import ProtocolName
from twin_bench.twin.encoded import Encoded, distinct
from twin_bench.twin.model import TwinModel, twin_class
from twin_bench.twin.parts import Parts
from twin_bench.twin.recipe import Recipe, RouterSettings
from twin_bench.twin.router import RouterConfig, Trained, train_router
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
    training rows that is. `feature_cache` is the directory in which features are kept from run to run, or None.
    `device` is where they are computed, and `batch_size` the largest number of rows in a forward pass, if it is given;
    the routers themselves are small, and trained on the CPU.
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

    @property
    def experts(self) -> tuple[str, ...]:
        """The experts' names, in the order of the weights' columns."""
        return tuple(self.recipe.experts)

    def twin(self, protocol: ProtocolName = "standard") -> TwinModel:
        """Return the twin without a router, in the recipe's dtype."""
        model = load_model(self.sources, self.shared, self.recipe.dtype)
        kind = twin_class(self.sources.skeleton.task_type)
        twin = kind(model, self.sources.tokenizer, self.parts, protocol=protocol)
        twin.feature_cache = self.feature_cache
        return twin.to(self.device)

    def owners(self, rows: Sequence[TaskInput]) -> Tensor:
        """Return the index (rows,) of each row's expert, the label that a router is trained on."""
        return torch.tensor([self.experts.index(row.task) for row in rows])


def train_routers(training: RouterTraining) -> tuple[Parts, dict[str, Any]]:
    """Return the twin's parts with trained routers and the twin's sensitivity, and a summary of the choices.

    The router's epoch and layer are chosen on held-out training rows. If the twin can run under the protocol paper
    and the data holds test rows, a second router is trained as the authors do.
    """
    settings, seed = training.settings, training.recipe.seed
    rows = _sampled(training.given.train, training.experts, settings.max_rows, seed)
    training = replace(training, rows=rows)
    held_out = held_out_rows(rows, training.experts, settings.held_out, seed)
    twin = training.twin()
    best, layer_accuracy = _best_router(training, twin, held_out)
    twin.router = copy.deepcopy(best.router).to(training.device)
    probes = [row for row, chooses in zip(rows, held_out, strict=True) if chooses]
    parts = replace(training.parts, router=best.router, sensitivity=_sensitivity(twin, probes))
    summary = {
        **settings.model_dump(exclude={"data"}),
        "layer": best.router.config.layer,
        "selected_on": "held-out training rows",
        **_summary(best),
        "layer_accuracy": layer_accuracy,
    }
    if settings.paper and parts.paper is not None:
        test_rows = training.given.test(min(settings.max_rows, PAPER_TEST_ROWS))
        if test_rows:
            paper = _paper_router(replace(training, parts=parts), test_rows)
            parts = replace(parts, paper=replace(parts.paper, router=paper.router))
            summary["paper"] = {"layer": -1, "selected_on": "test rows, as the authors do", **_summary(paper)}
    return parts, summary


def _best_router(training: RouterTraining, twin: TwinModel, held_out: Tensor) -> tuple[Trained, dict[str, float]]:
    """Train a router on each layer that the recipe allows. Return the most accurate one and all layers' accuracies."""
    settings, owner = training.settings, training.owners(training.rows)
    depth = training.sources.config.num_hidden_layers
    layers = list(range(depth + 1)) if settings.layer == "auto" else [settings.layer]
    features = _features(training, twin, training.rows, layers, "router features")
    best: Trained | None = None
    accuracy: dict[str, float] = {}
    pairs = list(zip(layers, features, strict=True))
    for layer, hidden in training.progress.track(pairs, description="router"):
        config = RouterConfig(training.experts, hidden.shape[1], layer, settings.top_k, settings.temperature)
        fit, chosen = (hidden[~held_out], owner[~held_out]), (hidden[held_out], owner[held_out])
        trained = train_router(config, *fit, *chosen, epochs=settings.epochs, seed=training.recipe.seed)
        accuracy[str(layer)] = trained.accuracy
        best = trained if best is None or trained.accuracy > best.accuracy else best
    assert best is not None
    return best, accuracy


def _paper_router(training: RouterTraining, test_rows: Sequence[TaskInput]) -> Trained:
    """Train a router as the authors do.

    It reads the last layer of the shared expert with the pretrained biases, and its epoch is chosen on the test rows.
    """
    twin = training.twin("paper")
    both, count = [*training.rows, *test_rows], len(training.rows)
    hidden = _features(training, twin, both, [-1], "router features (paper)")[0]
    owner = training.owners(both)
    fit, chosen = (hidden[:count], owner[:count]), (hidden[count:], owner[count:])
    config = RouterConfig(training.experts, hidden.shape[1])
    return train_router(config, *fit, *chosen, epochs=training.settings.epochs, seed=training.recipe.seed)


def _features(
    training: RouterTraining, twin: TwinModel, rows: Sequence[TaskInput], layers: Sequence[int], description: str
) -> list[Tensor]:
    """Return the features (rows, width) of each layer, in float32 on the CPU."""
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
        layers,
        batch_size=training.batch_size or fitting,
        progress=lambda done: progress.advance(bar, done),
    )
    progress.update(bar, completed=len(distinct_rows))
    for layer, hidden in zip(layers, features, strict=True):
        if not all_finite(hidden):
            bad = (~torch.isfinite(hidden)).any(dim=1)[place].nonzero()[0]
            raise InputError(
                f"router: the model's hidden state on layer {layer} is not finite for a row of {rows[int(bad)].task}; "
                "set dtype: float32 or bfloat16, or check the experts"
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


def _sampled(rows: Sequence[TaskInput], names: Sequence[str], limit: int, seed: int) -> list[TaskInput]:
    """Return a random sample of at most `limit` rows of each task."""
    generator = torch.Generator().manual_seed(seed)
    sample: list[TaskInput] = []
    for name in names:
        own = [row for row in rows if row.task == name]
        sample += [own[index] for index in torch.randperm(len(own), generator=generator)[:limit].tolist()]
    return sample


def require_two(rows: Sequence[TaskInput], names: Sequence[str], where: str) -> None:
    """Raise an InputError that begins with `where` if a task has fewer than two rows: one of them is held out."""
    counts = Counter(row.task for row in rows)
    for name in names:
        if counts[name] < 2:
            raise InputError(f"{where}: expert {name!r} has {counts[name]} rows; it needs two, one of them held out")


def held_out_rows(rows: Sequence[TaskInput], names: Sequence[str], fraction: float, seed: int) -> Tensor:
    """Return a mask (rows,) of the rows that are held out of training, on which the router is chosen.

    A fraction of each task's rows is held out, and at least one row. Rows with equal texts are all held out or all
    trained on, so that the router is not chosen on rows that it was trained on.

    Raises:
        InputError: A task has fewer than two rows.
    """
    require_two(rows, names, "router")
    texts = sorted({(row.text, row.text_pair or "") for row in rows})
    shuffled = torch.randperm(len(texts), generator=torch.Generator().manual_seed(seed)).tolist()
    rank = dict(zip(texts, shuffled, strict=True))
    mask = torch.zeros(len(rows), dtype=torch.bool)
    for name in names:
        own = sorted((rank[row.text, row.text_pair or ""], i) for i, row in enumerate(rows) if row.task == name)
        cut = own[max(1, int(fraction * len(own))) - 1][0]
        mask[[i for position, i in own if position <= cut]] = True
    return mask


def _summary(trained: Trained) -> dict[str, Any]:
    return {
        "epoch": trained.epoch,
        "accuracy": trained.accuracy,
        "task_accuracy": trained.task_accuracy,
        "rows": trained.rows,
        "selection_rows": trained.selection_rows,
    }

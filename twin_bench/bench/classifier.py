"""The cases of a classifier's twin: exact and near fusion, PEFT's mixed batch, and the authors' merge for each row."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import AutoModel

from twin_bench.bench.adapters import mixed_adapters
from twin_bench.bench.measure import Case, Cases, finished
from twin_bench.data.glue import GLUE
from twin_bench.data.rows import read_rows, split_path
from twin_bench.errors import InputError
from twin_bench.twin.classifier import TwinClassifier
from twin_bench.twin.directory import load_twin
from twin_bench.twin.encoded import Encoded
from twin_bench.twin.layers import TwinLayer
from twin_bench.twin.plan import Group, batches

TOLERANCES = (1e-3, 1e-5)


def classifier_cases(
    twin: TwinClassifier, directory: Path, data: Path, *, split: str, rows: int, batch_size: int, merged_rows: int
) -> Cases:
    """Return the cases of a classifier's twin, all on the same encoded rows.

    - `plain`: the shared expert as transformers runs it.
    - `one_hot` and `diffuse`: exact fusion with given weights, so without routing. The weights are the true task's
      expert, or draws from a flat Dirichlet.
    - The cases of `_router_cases`, if the twin has a router.
    - `peft_mixed`: PEFT's mixed batch, which gives each row one adapter only. It is unsupported if experts changed
      position embeddings.
    - `per_sample_merge`: all weights are merged for each row, as in the authors' code.
    """
    encoded, tasks = _stream(twin, data, split, rows)
    stream = _Stream(twin, encoded, tasks, batch_size)
    lengths = [len(row["input_ids"]) for row in encoded]
    everything = Group(tuple(range(len(encoded))), torch.zeros(len(twin.expert_names)))
    plain_batches = [list(b.rows) for b in batches(everything, lengths, batch_size, twin.costs)]
    one_hot = _one_hot([twin.expert_names.index(task) for task in tasks], twin)
    generator = torch.Generator().manual_seed(0)
    exponentials = -torch.rand(one_hot.shape, generator=generator).log()
    diffuse = exponentials / exponentials.sum(dim=1, keepdim=True)
    plain = load_twin(directory, dtype=twin.model.dtype).model.to(twin.device).eval()

    @torch.no_grad()
    def run_plain() -> None:
        for batch in plain_batches:
            finished(plain(**twin.collate([encoded[row] for row in batch])).logits)

    cases = {
        "plain": Case(run_plain, len(encoded)),
        "one_hot": stream.case(one_hot),
        "diffuse": stream.case(diffuse),
    }
    notes: dict[str, Any] = {"rows": len(encoded), "mean_tokens": sum(lengths) / len(lengths)}
    if twin.router is not None:
        routed, found = _router_cases(stream)
        cases |= routed
        notes |= {**found, "router_layer": twin.router.config.layer}
    cases["peft_mixed"] = Case(_peft_mixed(directory, twin, encoded, tasks, plain_batches), len(encoded))
    cases["per_sample_merge"] = Case(_per_sample_merge(plain, twin, encoded, diffuse, merged_rows), merged_rows)
    return Cases(cases, notes, optional={"peft_mixed"})


class _Stream(NamedTuple):
    """A twin and the encoded rows that every case answers."""

    twin: TwinClassifier
    encoded: list[Encoded]
    tasks: list[str]
    batch_size: int

    def route(self) -> Tensor:
        """Return the router's weights for every row."""
        return self.twin.route_all(self.encoded, self.tasks, batch_size=self.batch_size)

    def answers(self, weights: Tensor | None, tolerance: float = 0.0) -> list[Tensor]:
        """Return the logits of every row; without weights the twin routes."""
        self.twin.tolerance = tolerance
        found = self.twin.answer(self.encoded, self.tasks, batch_size=self.batch_size, fusion_weights=weights)
        finished(found[-1].logits)
        return [prediction.logits for prediction in found]

    def case(self, weights: Tensor | None, tolerance: float = 0.0) -> Case:
        """Return the case that answers with these weights."""
        return Case(lambda: self.answers(weights, tolerance), len(self.encoded))


def _router_cases(stream: _Stream) -> tuple[dict[str, Case], dict[str, Any]]:
    """Return the cases that need a router, and what is known about them.

    - `soft`: exact fusion with the router's weights, given, so without routing.
    - `soft_TOLERANCE`: the same with a tolerance. The notes have its sensitivity and errors.
    - `routed`: routing included.
    - `routed_top_1`: routing included, with the largest weight alone.
    """
    twin = stream.twin
    twin.tolerance = 0.0
    own = stream.route()
    cases, notes = {"soft": stream.case(own)}, {}
    exact = stream.answers(own)
    if twin.sensitivity is not None:
        errors = {}
        for tolerance in TOLERANCES:
            cases[f"soft_{tolerance:g}"] = stream.case(own, tolerance)
            errors[f"{tolerance:g}"] = _error(stream.answers(own, tolerance), exact, stream.tasks)
        notes = {"sensitivity": twin.sensitivity, "errors": errors}
    cases["routed"] = stream.case(None)

    def run_top_1() -> None:
        stream.answers(_one_hot(stream.route().argmax(dim=1), twin))

    cases["routed_top_1"] = Case(run_top_1, len(stream.encoded))
    return cases, notes


def _one_hot(experts: Sequence[int] | Tensor, twin: TwinClassifier) -> Tensor:
    """Return weights (rows, experts) that are 1 for each row's expert and 0 for the others."""
    return torch.nn.functional.one_hot(torch.as_tensor(experts), len(twin.expert_names)).float()


def _error(found: Sequence[Tensor], exact: Sequence[Tensor], tasks: Sequence[str]) -> float:
    """Return the logits' largest relative error over tasks, from root mean squares over each task's rows."""
    worst = 0.0
    for task in set(tasks):
        rows = [row for row, of in enumerate(tasks) if of == task]
        moved = sum(float((found[row] - exact[row]).abs().max()) ** 2 for row in rows)
        worst = max(worst, (moved / sum(float(exact[row].abs().max()) ** 2 for row in rows)) ** 0.5)
    return worst


def _stream(twin: TwinClassifier, data: Path, split: str, rows: int) -> tuple[list[Encoded], list[str]]:
    """Return `rows` encoded rows drawn evenly from the twin's tasks, shuffled, and their tasks."""
    known = [task for task in twin.expert_names if task in GLUE]
    if not known:
        raise InputError("bench: the twin has no expert of a GLUE task to take rows from")
    drawn = [
        (GLUE[task].texts(row), task)
        for task in known
        for row in read_rows(split_path(data, task, split), GLUE[task])[: -(-rows // len(known))]
    ]
    order = torch.randperm(len(drawn), generator=torch.Generator().manual_seed(0)).tolist()
    picked = [drawn[index] for index in order[:rows]]
    return twin.encode([text for text, _ in picked]), [task for _, task in picked]


def _peft_mixed(
    directory: Path,
    twin: TwinClassifier,
    encoded: Sequence[Encoded],
    tasks: Sequence[str],
    cut: Sequence[Sequence[int]],
) -> Callable[[], None]:
    """Return a run of PEFT's mixed batch: each row uses its own task's adapter, and adapters are not fused."""
    model = mixed_adapters(directory, AutoModel, twin)

    @torch.no_grad()
    def run() -> None:
        for batch in cut:
            inputs = twin.collate([encoded[row] for row in batch])
            finished(model(**inputs, adapter_names=[tasks[row] for row in batch]).last_hidden_state)

    return run


def _per_sample_merge(
    plain: Any, twin: TwinClassifier, encoded: Sequence[Encoded], weights: Tensor, rows: int
) -> Callable[[], None]:
    """Return a run like the authors' code: batch 1, and a dense sum of all experts' vectors for every sample."""
    merged = copy.deepcopy(plain)
    targets: list[tuple[Tensor, Tensor, Tensor]] = []
    modules = dict(plain.named_modules())
    layers = {name: module for name, module in twin.model.named_modules() if isinstance(module, TwinLayer)}
    for name, layer in layers.items():
        if not sum(layer.ranks) and layer.entries is None:
            continue
        dense = torch.stack([layer.difference(expert) for expert in range(len(layer.ranks))])
        targets.append((merged.get_parameter(f"{name}.weight"), modules[name].weight, dense))

    @torch.no_grad()
    def run() -> None:
        for row in range(rows):
            for parameter, shared, dense in targets:
                fused = shared.clone()
                for weight, vector in zip(weights[row].tolist(), dense, strict=True):
                    fused += weight * vector
                parameter.copy_(fused)
            finished(merged(**twin.collate([encoded[row]])).logits)

    return run

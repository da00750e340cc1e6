"""What is measured of a classifier's twin: exact and near fusion, PEFT's mixed batch, the authors' merge a row."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from twin_bench.bench.measure import Case, Cases, finished
from twin_bench.data.glue import GLUE
from twin_bench.data.rows import read_rows, split_path
from twin_bench.errors import InputError
from twin_bench.twin.classifier import TwinClassifier
from twin_bench.twin.directory import load_twin
from twin_bench.twin.model import Encoded
from twin_bench.twin.plan import Group, batches

TOLERANCES = (1e-3, 1e-5)


def classifier_cases(
    twin: TwinClassifier, directory: Path, data: Path, *, split: str, rows: int, batch_size: int, merged_rows: int
) -> Cases:
    """Return the cases of a classifier's twin, all on the same encoded rows.

    `plain` (the shared expert as transformers runs it); `one_hot` and `diffuse` (exact fusion with weights given, so
    that routing is not counted: the true task's expert, and draws from a flat Dirichlet); `soft` (the router's own
    weights, likewise) and `soft_TOLERANCE`; `routed` and `routed_top_1` (routing counted; the largest weight alone);
    `peft_mixed` (PEFT's mixed batch, which can give a row one adapter only, and none where experts changed position
    embeddings) and `per_sample_merge` (all weights merged for each row, as the authors' code does).
    """
    encoded, tasks = _stream(twin, data, split, rows)
    lengths = [len(row["input_ids"]) for row in encoded]
    everything = Group(tuple(range(len(encoded))), None)
    plain_batches = [list(b.rows) for b in batches(everything, lengths, batch_size, overhead=twin.batch_overhead)]
    experts = len(twin.expert_names)
    one_hot = torch.nn.functional.one_hot(torch.tensor([twin.expert_names.index(task) for task in tasks]), experts)
    generator = torch.Generator().manual_seed(0)
    exponentials = -torch.rand(one_hot.shape, generator=generator).log()
    diffuse = exponentials / exponentials.sum(dim=1, keepdim=True)
    plain = load_twin(directory, dtype=twin.model.dtype).model.to(twin.device).eval()

    @torch.no_grad()
    def run_plain() -> None:
        for batch in plain_batches:
            finished(plain(**twin.collate([encoded[row] for row in batch])).logits)

    def answers(weights: Tensor | None, tolerance: float = 0.0) -> list[Tensor]:
        twin.tolerance = tolerance
        found = twin.answer(encoded, tasks, batch_size=batch_size, fusion_weights=weights)
        finished(found[-1].logits)
        return [prediction.logits for prediction in found]

    def run(weights: Tensor | None, tolerance: float = 0.0) -> Callable[[], None]:
        def run_it() -> None:
            answers(weights, tolerance)

        return run_it

    cases = {
        "plain": Case(run_plain, len(encoded)),
        "one_hot": Case(run(one_hot.float()), len(encoded)),
        "diffuse": Case(run(diffuse), len(encoded)),
    }
    notes: dict[str, Any] = {"rows": len(encoded), "mean_tokens": sum(lengths) / len(lengths)}
    if twin.router is not None:
        twin.tolerance = 0.0
        own = twin.route_all(encoded, tasks, batch_size=batch_size)
        cases["soft"] = Case(run(own), len(encoded))
        exact = answers(own)
        if twin.sensitivity is not None:
            notes |= {"sensitivity": twin.sensitivity, "errors": {}}
            for tolerance in TOLERANCES:
                cases[f"soft_{tolerance:g}"] = Case(run(own, tolerance), len(encoded))
                notes["errors"][f"{tolerance:g}"] = _error(answers(own, tolerance), exact, tasks)
        cases["routed"] = Case(run(None), len(encoded))
        notes["router_layer"] = twin.router.config.layer

        def run_top_1() -> None:
            weights = twin.route_all(encoded, tasks, batch_size=batch_size)
            answers(torch.nn.functional.one_hot(weights.argmax(dim=1), experts).float())

        cases["routed_top_1"] = Case(run_top_1, len(encoded))
    cases["peft_mixed"] = Case(_peft_mixed(directory, twin, encoded, tasks, plain_batches), len(encoded))
    cases["per_sample_merge"] = Case(_per_sample_merge(plain, twin, encoded, diffuse, merged_rows), merged_rows)
    return Cases(cases, notes, optional={"peft_mixed"})


def _error(found: Sequence[Tensor], exact: Sequence[Tensor], tasks: Sequence[str]) -> float:
    """Return the logits' error relative to their size, both as root mean squares over a task's rows, at its most."""
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
        raise InputError("bench: the twin has no expert of a GLUE task to take rows of")
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
    """Return a run of PEFT's mixed batch: each row through its own task's adapter, no fusion of several."""
    from peft import PeftModel
    from transformers import AutoModel

    backbone = AutoModel.from_pretrained(directory / "model", dtype=twin.model.dtype).to(twin.device)
    first, *others = twin.expert_names
    model = PeftModel.from_pretrained(backbone, str(directory / "experts" / first), adapter_name=first)
    for name in others:
        model.load_adapter(str(directory / "experts" / name), adapter_name=name)
    model.eval()

    @torch.no_grad()
    def run() -> None:
        for batch in cut:
            inputs = twin.collate([encoded[row] for row in batch])
            finished(model(**inputs, adapter_names=[tasks[row] for row in batch]).last_hidden_state)

    return run


def _per_sample_merge(
    plain: Any, twin: TwinClassifier, encoded: Sequence[Encoded], weights: Tensor, rows: int
) -> Callable[[], None]:
    """Return a run as the authors' code has it: batch 1, a dense sum of all experts' vectors for every sample."""
    merged = copy.deepcopy(plain)
    targets: list[tuple[Tensor, Tensor, Tensor]] = []
    modules = dict(plain.named_modules())
    for name, layer in ((n, m) for n, m in twin.model.named_modules() if hasattr(m, "ranks") and sum(m.ranks)):
        starts = [sum(layer.ranks[:t]) for t in range(len(layer.ranks) + 1)]
        B, A = layer.factors()
        dense = torch.stack([B[:, a:b] @ A[a:b] for a, b in itertools.pairwise(starts)])
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

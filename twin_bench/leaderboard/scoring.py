"""Cells are computed: a method's models are made and scored, and each cell is written as soon as it is there."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from twin_bench.contenders import Contender, contenders
from twin_bench.contenders.references import Asked, ReferenceMethod
from twin_bench.contenders.storage import base_bytes
from twin_bench.data.named import NamedTask
from twin_bench.data.rows import TaskRows
from twin_bench.errors import NotFiniteError
from twin_bench.leaderboard.harness import Evaluated, Job
from twin_bench.leaderboard.prepared import Run
from twin_bench.leaderboard.suite import Entry, entry_of
from twin_bench.leaderboard.tune import chosen, keep, tuned
from twin_bench.measured import OtherWork
from twin_bench.protocols import ProtocolName
from twin_bench.results.cells import Cell, installed_versions
from twin_bench.results.samples import Samples, read_samples

TARGETS_OF = "pretrained"
"""The row whose samples hold the expected answers of the rows that are scored. It is computed before all others."""
WORKING = 0.5
"""A process that works on a CPU has at least one core for this part of the time, or else it waits for others."""


def cells_of(run: Run, given: Entry, listed: ProtocolName) -> Iterator[Cell]:
    """Yield the cells of one entry under one protocol: those that are there, then each new one when it is written."""
    protocol = run.computed_under(given, listed)
    for own in run.of_each_seed(given):
        entry = with_options(own, given, protocol)
        keys = {task: own.key(entry, protocol, task) for task in own.answered(entry)}
        done = {task: own.cells.read(protocol, entry.label, task, key) for task, key in keys.items()}
        yield from (cell for cell in done.values() if cell is not None)
        missing = {task: keys[task] for task, cell in done.items() if cell is None}
        if isinstance(entry.method, ReferenceMethod):
            yield from _referenced(own, entry, entry.method, protocol, missing)
        elif missing:
            yield from _contended(own, entry, protocol, missing)


def with_options(run: Run, entry: Entry, protocol: ProtocolName) -> Entry:
    """Return an entry with its options chosen, if it is to be tuned: those of an earlier run, or new ones."""
    if not entry.to_tune:
        return entry
    key = run.choice_key(entry, protocol)
    known = chosen(entry, run.tuning, key)
    if known is None:
        bounded = run.suite.model_copy(update={"rows": run.rows, "seeds": 1})
        known = tuned(entry, protocol, bounded, list(run.tasks.values()), run.tuning, run.trial)
        keep(known, run.tuning, key)
    return known


def _contended(run: Run, entry: Entry, protocol: ProtocolName, missing: Mapping[str, str]) -> Iterator[Cell]:
    """Make the entry's models, and yield the missing cells (task to key) as they are written."""
    for contender in contenders(entry.method, run.context(entry, protocol)):
        contender.twin.to(run.device)
        for task in contender.tasks:
            if task in missing:
                evaluated, seconds = _evaluated(run, contender, entry, protocol, run.tasks[task])
                costs = {
                    "seconds": seconds,
                    "model_seconds": evaluated.model_seconds,
                    "build_seconds": contender.build_seconds,
                    "build_peak_bytes": contender.build_peak_bytes,
                    "parameters": contender.parameters,
                    "stored_bytes": contender.stored_bytes,
                    "relative_storage": contender.stored_bytes / base_bytes(run.sources),
                }
                notes = {**contender.notes, **entry.notes, **evaluated.notes}
                yield _written(run, entry, protocol, task, missing[task], evaluated, costs, notes)


def _evaluated(
    run: Run, contender: Contender, entry: Entry, protocol: ProtocolName, rows: TaskRows
) -> tuple[Evaluated, float]:
    """Return a task's score through the harness, and how many seconds that took.

    The model's own seconds say nothing where other processes took part of the machine, so they are left out then.
    """
    job = Job(
        name=f"{protocol}-{entry.label}",
        asked=rows,
        suite=run.suite,
        workspace=run.out / run.harness.name,
        rows=run.rows_scored(entry, protocol),
    )
    started, processor = time.perf_counter(), time.process_time()
    try:
        with OtherWork() as others:
            evaluated = run.harness.score(contender, job)
    except NotFiniteError as error:
        raise NotFiniteError(f"{rows.task.name}: {error}") from None
    seconds, processor = time.perf_counter() - started, time.process_time() - processor
    waited = run.device_kind == "cpu" and processor < WORKING * seconds
    if others.busy or waited:
        evaluated = replace(evaluated, model_seconds=None)
    return evaluated, seconds


def _referenced(
    run: Run, entry: Entry, method: ReferenceMethod, protocol: ProtocolName, missing: Mapping[str, str]
) -> Iterator[Cell]:
    """Yield the missing cells of a reference, whose answers are scored as a model's are."""
    nothing = {"seconds": 0.0, "model_seconds": None, "build_seconds": None, "build_peak_bytes": None}
    nothing |= {"parameters": 0, "stored_bytes": 0, "relative_storage": 0.0}
    for task, key in missing.items():
        rows, scored = run.tasks[task], _scored_samples(run, protocol, task)
        if scored is None or scored.pooled is None:
            continue
        asked = Asked(rows, scored.targets, _training_answers(run, rows), run.harness.scores_own_rows)
        answers = method.answer(asked)
        if answers is not None:
            evaluated = _scored_by_rows(rows, scored, answers)
            yield _written(run, entry, protocol, task, key, evaluated, nothing, {})


def _scored_samples(run: Run, protocol: ProtocolName, task: str) -> Samples | None:
    """Return the samples that hold the expected answers of the rows that are scored."""
    first = entry_of(TARGETS_OF)
    cell = run.cells.read(protocol, first.label, task, run.key(first, protocol, task))
    return None if cell is None or cell.samples is None else read_samples(run.out / cell.samples)


def _training_answers(run: Run, rows: TaskRows) -> Sequence[Any] | None:
    """Return the expected answers of a task's training rows; none of free texts.

    It is None without training rows, or if they are the rows that are scored.
    """
    if isinstance(rows.task, NamedTask):
        return run.harness.training_answers(rows.task)
    file = rows.file("train")
    return rows.training_answers() if rows.split != "train" and file.is_file() and file.read_bytes().strip() else None


def _scored_by_rows(rows: TaskRows, scored: Samples, answers: Sequence[Any]) -> Evaluated:
    """Return the score of answers to the rows of `scored`, with its standard error."""
    task = rows.task
    own = [task.row_score(answer, target) for answer, target in zip(answers, scored.targets, strict=True)]
    samples = Samples(
        scored.identities, answers, scored.targets, own, scored.pooled, scored.clusters, texts=scored.texts
    )
    score, error = samples.score(task.metric), samples.standard_error(task.metric)
    return Evaluated(score, error, len(answers), samples)


def _written(
    run: Run,
    entry: Entry,
    protocol: ProtocolName,
    task: str,
    key: str,
    evaluated: Evaluated,
    costs: Mapping[str, Any],
    notes: Mapping[str, Any],
) -> Cell:
    """Write a cell with its samples, and return it."""
    asked, suite = run.tasks[task].task, run.suite
    unit = 100 if asked.percent else 1
    cell = Cell(
        suite=suite.name,
        protocol=protocol,
        method=entry.label,
        track=entry.track,
        task=task,
        expert=asked.expert,
        metric=asked.metric,
        higher_is_better=asked.higher_is_better,
        percent=asked.percent,
        score=unit * evaluated.score,
        stderr=None if evaluated.stderr is None else unit * evaluated.stderr,
        n=evaluated.n,
        seed=suite.seed,
        settings=entry.settings(suite.seed),
        notes=notes,
        device=run.device_kind,
        measured=run.started,
        versions=installed_versions(),
        key=key,
        samples=None,
        **costs,
    )
    samples = evaluated.samples
    return run.cells.write(cell, samples if samples is None or run.log_texts else samples.without_texts())

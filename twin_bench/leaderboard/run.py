"""Run a suite: every method on every task through a harness adapter, one finished cell at a time."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import logging
import time
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal, NamedTuple

from rich.progress import Progress

from twin_bench import demo
from twin_bench.checkpoints.hub import model_directory
from twin_bench.checkpoints.sources import open_sources
from twin_bench.data import TASKS
from twin_bench.data.metrics import mean, mean_standard_error
from twin_bench.data.rows import hub_rows, read_router_rows, split_path
from twin_bench.errors import InputError, UnsuitedError
from twin_bench.files import digest, digest_files, write_text
from twin_bench.leaderboard.cells import Board, Cell, Cells, Skipped
from twin_bench.leaderboard.serve import serve
from twin_bench.leaderboard.served import Served
from twin_bench.leaderboard.suite import EMBEDDED, HUB, Entry, Suite, supports
from twin_bench.leaderboard.tune import tuned, with_tuned
from twin_bench.twin.causal import TwinCausalLM
from twin_bench.twin.parts import ProtocolName

Harness = Literal["lm-eval", "helm"]
PAPER_ROWS = {"routed": 1000}
PAPER_ROWS_STATIC = 1001
"""The authors score the first 1,000 validation rows of a task with a router, the first 1,001 without."""


def run_suite(
    suite: Suite,
    out: Path,
    *,
    only: Sequence[str] | None = None,
    limit: int | None = None,
    harness: Harness = "lm-eval",
    tune: bool = False,
    progress: Progress | None = None,
) -> Board:
    """Return a suite's cells, running those that `out`/cells does not hold yet.

    A method that raises UnsuitedError is skipped, with its reason: it has no cell in the result, not even of a task
    that it could do.

    Args:
        suite: what to run.
        out: where cells, generated rows, built twins and their routers' features go.
        only: labels or method names; the bounds run in any case.
        limit: the first so many rows of each task; HELM draws as many.
        harness: lm-eval, or helm, which scores language models on its own scenarios' rows.
        tune: give each method that has a grid a second row, its options chosen on held-out training rows.
        progress: where the bars go.

    Raises:
        InputError: an unknown method, wrong rows or experts: before anything is run where it can be known.
    """
    progress = progress or Progress(disable=True)
    entries = suite.entries(None if only is None else list(only))
    if suite.experts == EMBEDDED:
        suite = suite.model_copy(update={"experts": str(demo.experts_directory())})
    if harness == "helm" and suite.task_type != "causal_lm":
        raise InputError(f"suite {suite.name}: --harness helm asks for text, and these are classifiers")
    if tune and harness == "helm":
        raise InputError("--tune chooses options on held-out training rows, which HELM does not score; leave it out")
    if tune:
        entries = with_tuned(entries)
    data = _rows_directory(suite, out)
    sources = open_sources(suite.base_model, suite.expert_paths)
    if sources.skeleton.task_type != suite.task_type:
        raise InputError(f"suite {suite.name}: {suite.tasks[0]} needs {suite.task_type} experts, these are not")
    inputs = _input_digests(suite, data)
    if any(entry.track == "routed" and entry.method.name == "twin" for entry in entries):
        read_router_rows(data, suite.tasks)
    twins = out / "twins" / digest([version("twin-bench"), inputs])[:16]  # other inputs, other twins
    if harness == "helm":
        inputs["rows"] |= _helm_digests(suite, data, out)
    cells = Cells(out / ("cells" if harness == "lm-eval" else "cells-helm"))
    finished: list[Cell] = []
    skipped: list[Skipped] = []
    bounded = suite.model_copy(update={"rows": suite.rows if limit is None else limit})

    def trial(held_out: Suite) -> Board:
        return run_suite(held_out, out / "tuning", progress=progress)

    work = [(p, entry) for p in suite.protocol for entry in entries if supports(entry, p)]
    bar = progress.add_task("cells", total=len(work) * len(suite.tasks))
    for listed, given in work:
        protocol: ProtocolName = "standard" if _same_as_standard(given, suite, listed) else listed
        done: dict[str, Cell | None] = {}
        try:
            entry = tuned(given, protocol, bounded, data, out / "tuning", trial) if given.to_tune else given
            keys = {task: _key(suite, entry, protocol, task, inputs, limit, harness) for task in suite.tasks}
            done = {task: cells.read(protocol, entry.label, task, keys[task]) for task in suite.tasks}
            found = sum(cell is not None for cell in done.values())
            progress.update(bar, description=f"{protocol} {entry.label}", advance=found)
            scored = _row_limit(entry, protocol, suite, limit)
            served_by = serve(
                entry, protocol, suite, data, sources, twins, progress, feature_cache=out / "features", rows=scored
            )
            models = () if all(done.values()) else served_by
            for served in models:
                for task in served.tasks:
                    if done[task] is None:
                        evaluated = (
                            _through_lm_eval(served, entry, protocol, suite, task, data, limit)
                            if harness == "lm-eval"
                            else _through_helm(served, entry, protocol, suite, task, out, limit)
                        )
                        done[task] = _cell(evaluated, served, entry, protocol, suite, task, keys[task])
                        cells.write(done[task])  # type: ignore[arg-type]
                        progress.advance(bar)
        except UnsuitedError as error:
            if given.track == "bound":
                raise
            progress.advance(bar, len(suite.tasks) - sum(cell is not None for cell in done.values()))
            skipped.append(Skipped(suite.name, listed, given.label, given.track, str(error)))
            continue
        finished += [dataclasses.replace(cell, protocol=listed) for cell in done.values() if cell is not None]
    return Board(finished, skipped)


class Evaluated(NamedTuple):
    """A task's score and its standard error (0 to 1) over `n` rows, the seconds it took, and what else is known."""

    score: float
    stderr: float
    n: int
    seconds: float
    notes: dict[str, Any]


def _through_lm_eval(
    served: Served, entry: Entry, protocol: ProtocolName, suite: Suite, task: str, data: Path, limit: int | None
) -> Evaluated:
    """Score a task through lm-eval and the adapter, as the command line runs it."""
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    from twin_bench.paths import tasks_directory
    from twin_bench_lm_eval.model import serving

    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    lm = serving(served.twin, task=task, batch_size=suite.batch_size, max_length=suite.max_length)
    manager = TaskManager(
        include_path=str(tasks_directory()),
        include_defaults=False,
        metadata={"data": str(data), "split": suite.split},
    )
    started = time.perf_counter()
    with contextlib.redirect_stderr(io.StringIO()):  # lm-eval's bars, a dozen a cell; errors still raise
        results: dict[str, Any] = simple_evaluate(
            model=lm,
            tasks=[f"twin_{task}"],
            task_manager=manager,
            limit=_row_limit(entry, protocol, suite, limit),
            bootstrap_iters=0,
            log_samples=False,
            random_seed=suite.seed,
            numpy_random_seed=suite.seed,
            torch_random_seed=suite.seed,
        )
    metric = TASKS[task].metric
    scores = results["results"][f"twin_{task}"]
    return Evaluated(
        score=scores[f"{metric},none"],
        stderr=scores[f"{metric}_stderr,none"],
        n=results["n-samples"][f"twin_{task}"]["effective"],
        seconds=time.perf_counter() - started,
        notes={"chance": 100 * scores["chance,none"]} if "chance,none" in scores else {},
    )


def _through_helm(
    served: Served, entry: Entry, protocol: ProtocolName, suite: Suite, task: str, out: Path, limit: int | None
) -> Evaluated:
    """Score a task through HELM's own run specs and statistics: its rows, prompts and sampling."""
    from twin_bench_helm.evaluate import evaluate

    assert isinstance(served.twin, TwinCausalLM)
    started = time.perf_counter()
    with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
        scored = evaluate(
            served.twin,
            f"{protocol}-{entry.label}",
            task,
            TASKS[task].metric,
            workspace=out / "helm",
            rows=suite.rows if limit is None else limit,
            batch_size=suite.batch_size,
        )
    return Evaluated(
        score=mean(scored.values),
        stderr=mean_standard_error(scored.values),
        n=len(scored.values),
        seconds=time.perf_counter() - started,
        notes={"harness": f"crfm-helm {version('crfm-helm')}"},
    )


def _cell(
    evaluated: Evaluated, served: Served, entry: Entry, protocol: ProtocolName, suite: Suite, task: str, key: str
) -> Cell:
    return Cell(
        suite=suite.name,
        protocol=protocol,
        method=entry.label,
        track=entry.track,
        task=task,
        metric=TASKS[task].metric,
        score=100 * evaluated.score,
        stderr=100 * evaluated.stderr,
        n=evaluated.n,
        seed=suite.seed,
        seconds=evaluated.seconds,
        build_seconds=served.build_seconds,
        parameters=served.parameters,
        settings=entry.settings(suite.seed),
        notes={**served.notes, **entry.notes, **evaluated.notes},
        key=key,
    )


def _same_as_standard(entry: Entry, suite: Suite, protocol: ProtocolName) -> bool:
    """Return whether an entry has nothing that `protocol` changes.

    The bounds have no router to name a head, and no factors of a language model's to add; a language model has no
    head.
    """
    if protocol == "routed":
        return entry.track == "bound" or suite.task_type == "causal_lm"
    return protocol == "paper" and entry.track == "bound" and suite.task_type == "causal_lm"


def _row_limit(entry: Entry, protocol: ProtocolName, suite: Suite, limit: int | None) -> int | None:
    limit = suite.rows if limit is None else limit
    if protocol != "paper" or suite.task_type != "sequence_classification":
        return limit
    rows = PAPER_ROWS.get(entry.track, PAPER_ROWS_STATIC)
    return rows if limit is None else min(rows, limit)


def _rows_directory(suite: Suite, out: Path) -> Path:
    """Return the directory of {task}/{split}.jsonl, generated or fetched where the suite says so."""
    if suite.data == EMBEDDED:
        directory = out / "data" / EMBEDDED
        demo.write_data(directory)  # of the seed that the shipped experts were trained on
        return directory
    if suite.data == HUB:
        directory = out / "data" / HUB
        for task in suite.tasks:
            for split in ("train", suite.split):
                file = split_path(directory, task, split)
                if not file.is_file():
                    rows = hub_rows(TASKS[task], split)
                    write_text(file, "".join(json.dumps(row) + "\n" for row in rows))
        return directory
    directory = Path(suite.data)
    for task in suite.tasks:
        file = split_path(directory, task, suite.split)
        if not file.is_file():
            raise InputError(f"{file}: no such file; suite {suite.name} scores {{data}}/{{task}}/{suite.split}.jsonl")
    return directory


def _input_digests(suite: Suite, data: Path) -> dict[str, Any]:
    """Return digests of what scores depend on besides settings: weights and rows."""
    files = [
        split_path(data, task, split)
        for task in suite.tasks
        for split in sorted({"train", "dev", "validation", suite.split})
    ]
    return {
        "base_model": digest_files(model_directory(suite.base_model)),
        "experts": {task: digest_files(model_directory(path)) for task, path in suite.expert_paths.items()},
        "rows": {f"{file.parent.name}/{file.stem}": digest_files(file) for file in files if file.is_file()},
    }


def _helm_digests(suite: Suite, data: Path, out: Path) -> dict[str, str]:
    """Return digests of HELM's raw files, by task; InputError where they are missing."""
    if suite.helm is None or not Path(suite.helm).is_dir():
        raise InputError(
            f"suite {suite.name}: helm: {suite.helm}; name a directory of HELM's raw files, as they lie under "
            "benchmark_output/scenarios"
        )
    from twin_bench_helm.evaluate import copy_scenarios, run_entries

    scenarios = out / "helm" / "benchmark_output" / "scenarios"
    copy_scenarios(Path(suite.helm), data, scenarios)
    for task in suite.tasks:
        run_entries(task, scenarios)  # says which file is missing
    # The sources: HELM adds files of its own to the copies.
    files = [file for file in sorted(Path(suite.helm).rglob("*")) if file.is_file()]
    digests = digest([f"{file.relative_to(suite.helm)}:{digest_files(file)}" for file in files])
    return dict.fromkeys((f"{task}/helm" for task in suite.tasks), digests)


def _key(
    suite: Suite,
    entry: Entry,
    protocol: ProtocolName,
    task: str,
    inputs: dict[str, Any],
    limit: int | None,
    harness: Harness,
) -> str:
    """Return the digest of everything that decides a cell's score."""
    # A twin's router, what learns at test time and statistics saw all tasks' rows; a prompt holds its own examples.
    own = {name: rows for name, rows in inputs["rows"].items() if name.startswith(f"{task}/")}
    learnt = entry.track == "calibration" or (entry.track in ("routed", "test-time") and entry.method.needs)
    rows = inputs["rows"] if learnt else own
    return digest(
        {
            "twin_bench": version("twin-bench"),
            "method": entry.method.name,
            "settings": entry.settings(suite.seed),
            "protocol": protocol,
            "task": task,
            "inputs": {**inputs, "rows": rows},
            "split": suite.split,
            "seed": suite.seed,
            "max_length": suite.max_length,
            "dtype": suite.dtype,
            "limit": suite.rows if limit is None else limit,
            **({"calibration_rows": suite.calibration_rows} if entry.method.statistics else {}),
            **({"notes": dict(entry.notes)} if entry.notes else {}),
            **({"harness": harness} if harness != "lm-eval" else {}),
        }
    )

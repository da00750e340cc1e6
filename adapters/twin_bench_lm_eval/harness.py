"""lm-eval as a harness of the leaderboard: it scores tasks as the `lm_eval` command does."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import numpy
import torch
from lm_eval import evaluate
from lm_eval.tasks import TaskManager

from twin_bench.contenders import Contender
from twin_bench.data.named import NamedTask
from twin_bench.data.rows import TaskRows
from twin_bench.data.task import Row, Task
from twin_bench.errors import InputError, NotFiniteError, first_line
from twin_bench.leaderboard.harness import Evaluated, Harness, Job
from twin_bench.leaderboard.suite import Suite
from twin_bench.paths import tasks_directory
from twin_bench_lm_eval.model import serving
from twin_bench_lm_eval.named import (
    DRAWS,
    FEWSHOT_SEED,
    Loaded,
    code_digest,
    described,
    find_tasks,
    load,
    prompts,
    quiet,
    rows_digest,
    standard_error,
    training_answers,
)
from twin_bench_lm_eval.samples import samples_of
from twin_bench_lm_eval.tasks import lm_eval_task


class LmEval(Harness):
    """lm-evaluation-harness. It scores every suite: on the suite's own rows, and lm-eval's tasks on lm-eval's."""

    name: ClassVar[str] = "lm-eval"

    def __init__(self) -> None:
        self._loaded: dict[str, Loaded] = {}
        self._own: dict[tuple[str, Path, str], Loaded] = {}

    def check(self, suite: Suite) -> None:
        """Accept every suite."""

    def tasks(self, suite: Suite) -> Mapping[str, Task]:
        """Return the suite's tasks, those of lm-eval's own with their metrics. InputError for one that is not there."""
        kinds = suite.kinds
        named = [task for task in kinds.values() if isinstance(task, NamedTask)]
        for task in named:
            if task.entry is not None:
                raise InputError(f"task {task.name!r}: helm: {task.entry}; it is HELM's: --harness helm")
        manager = find_tasks([task.name for task in named], suite.include_path) if named else None
        for task in named:
            assert manager is not None
            loaded = load(task, manager, unsafe_code=suite.confirm_run_unsafe_code, include_path=suite.include_path)
            self._loaded[task.name] = loaded
            kinds[task.name] = described(task, loaded)
        return kinds

    def input_digests(self, suite: Suite, tasks: Mapping[str, TaskRows], workspace: Path) -> dict[str, str]:
        """Return the digest of what each of lm-eval's own tasks asks."""
        if not self._loaded:
            return {}
        code = code_digest(suite.include_path)
        with quiet():
            return {f"{name}/lm-eval": rows_digest(loaded, code) for name, loaded in self._loaded.items()}

    def row_count(self, rows: TaskRows) -> int | None:
        """Return how many rows of a task there are to be scored."""
        loaded = self._loaded.get(rows.task.name)
        return super().row_count(rows) if loaded is None else sum(len(leaf.eval_docs) for leaf in loaded.tasks.values())

    def prompts(self, task: Task, *, scored: bool) -> Iterable[Row]:
        """Return the prompts and answers of one of lm-eval's own tasks."""
        with quiet():
            return list(prompts(self._loaded[task.name], scored=scored))

    def training_answers(self, task: Task) -> Sequence[str | int] | None:
        """Return the expected answers of documents that are not scored, of one of lm-eval's own tasks."""
        if not isinstance(task, NamedTask):
            return None
        with quiet():
            return training_answers(task, self._loaded[task.name])

    def score(self, contender: Contender, job: Job) -> Evaluated:
        """Score a contender on one task."""
        suite, task = job.suite, job.asked.task
        limits: dict[str, Any] = {"batch_size": suite.batch_size, "max_length": suite.max_length}
        served = partial(serving, contender.twin, task=task.expert, **limits)
        loaded, seed = self._asked(job.asked), suite.seed
        try:
            model, results = _evaluate(served, loaded, limit=job.rows, seed=seed, errors=isinstance(task, NamedTask))
        except OverflowError as overflow:  # of a perplexity
            raise NotFiniteError(f"{task.metric}: {first_line(overflow)}") from overflow
        scores = results["results"][task.name]
        metric, _, kind = task.metric.partition(",")
        key = f"{metric},{kind or 'none'}"
        if key not in scores:
            found = ", ".join(name for name in scores if "," in name and "_stderr" not in name)
            raise InputError(f"task {task.name!r}: no metric {task.metric!r}; it has: {found}")
        error = scores.get(f"{metric}_stderr,{kind or 'none'}")
        if not isinstance(error, float) or not math.isfinite(error):  # "N/A"
            values = [row[metric] for row in results["samples"].get(task.name, []) if row["filter"] == (kind or "none")]
            leaf = loaded.tasks.get(task.name)
            error = None if leaf is None else standard_error(leaf, metric, values, seed)
        score = task.finite(scores[key]) if isinstance(task, NamedTask) else float(scores[key])
        return Evaluated(
            score=score,
            stderr=error,
            n=scores["sample_len"],
            samples=samples_of(task, loaded, results["samples"], model, score),
            model_seconds=model.model_seconds,
            notes={"chance": 100 * scores["chance,none"]} if "chance,none" in scores else {},
        )

    def _asked(self, rows: TaskRows) -> Loaded:
        """Return what lm-eval runs for a task. It is made once, for all methods."""
        if isinstance(rows.task, NamedTask):
            return self._loaded[rows.task.name]
        place = rows.task.name, rows.directory, rows.split
        if place not in self._own:
            with quiet():
                self._own[place] = Loaded({rows.task.name: lm_eval_task(rows.task, rows)}, None)
        return self._own[place]

    def timed_runs(
        self, twin: Any, plain: Any, tasks: Sequence[str], data: Path, *, split: str, rows: int, batch_size: int
    ) -> Mapping[str, Callable[[], object]]:
        """Return `lm_eval_hf` and `lm_eval_twin`: what `lm_eval` runs once a model is loaded.

        Prompts, requests, answers and scores count, and so does the twin's routing.
        """
        from lm_eval.models.huggingface import HFLM

        from twin_bench_lm_eval.causal import CausalTwin

        models: dict[str, Callable[[], Any]] = {
            "lm_eval_hf": partial(HFLM, pretrained=plain, tokenizer=twin.tokenizer, batch_size=batch_size),
            "lm_eval_twin": partial(CausalTwin, twin=twin, batch_size=batch_size),
        }
        loaded = load_own([f"twin_{task}" for task in tasks], data, split)

        def evaluate(make: Callable[[], Any]) -> object:
            return _evaluate(make, loaded, limit=rows, seed=0, errors=False)

        return {name: partial(evaluate, make) for name, make in models.items()}


def load_own(names: Sequence[str], data: Path, split: str) -> Loaded:
    """Return tasks of tasks/, as the command `lm_eval` finds them, on the rows in `data`."""
    with quiet():
        manager = TaskManager(
            include_path=str(tasks_directory()),
            include_defaults=False,
            metadata={"data": str(data), "split": split},
        )
        return Loaded(manager.load(list(names))["tasks"], None)


def _evaluate(
    make: Callable[[], Any], loaded: Loaded, *, limit: int | None, seed: int, errors: bool
) -> tuple[Any, dict[str, Any]]:
    """Run lm-eval on a model that `make` returns, in this process, without its bars: errors still raise.

    Return the model and lm-eval's results. With `errors`, lm-eval computes standard errors.
    """
    random.seed(seed)
    numpy.random.seed(seed)
    torch.manual_seed(seed)
    for task in loaded.tasks.values():
        task.set_fewshot_seed(FEWSHOT_SEED)
    with quiet():
        # Not simple_evaluate: after each evaluation it describes the machine and asks git, which takes over a second.
        model = make()
        results: dict[str, Any] = evaluate(
            model,
            loaded.task_dict,
            limit=limit,
            bootstrap_iters=DRAWS if errors else 0,
            confirm_run_unsafe_code=True,  # `load` has asked
        )
    return model, results

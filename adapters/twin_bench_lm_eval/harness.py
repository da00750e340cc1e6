"""lm-eval as a harness of the leaderboard: it scores the tasks in tasks/ as the `lm_eval` command does."""

from __future__ import annotations

import contextlib
import io
import logging
import random
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import numpy
import torch
from lm_eval import evaluate
from lm_eval.tasks import TaskManager

from twin_bench.contenders import Contender
from twin_bench.data import TASKS
from twin_bench.leaderboard.harness import Evaluated, Harness, Job
from twin_bench.leaderboard.suite import Suite
from twin_bench.paths import tasks_directory
from twin_bench_lm_eval.model import serving


class LmEval(Harness):
    """lm-evaluation-harness. It scores every suite, on the suite's own rows."""

    name: ClassVar[str] = "lm-eval"

    def check(self, suite: Suite) -> None:
        """Accept every suite."""

    def score(self, contender: Contender, job: Job) -> Evaluated:
        """Score a contender on one task."""
        suite, task = job.suite, f"twin_{job.task}"
        model = serving(contender.twin, task=job.task, batch_size=suite.batch_size, max_length=suite.max_length)
        results = _evaluate(model, [task], job.data, suite.split, limit=job.rows, seed=suite.seed)
        scores, metric = results["results"][task], TASKS[job.task].metric
        return Evaluated(
            score=scores[f"{metric},none"],
            stderr=scores[f"{metric}_stderr,none"],
            n=results["n-samples"][task]["effective"],
            notes={"chance": 100 * scores["chance,none"]} if "chance,none" in scores else {},
        )

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
        named = [f"twin_{task}" for task in tasks]

        def evaluate(make: Callable[[], Any]) -> object:
            return _evaluate(make(), named, data, split, limit=rows, seed=0)

        return {name: partial(evaluate, make) for name, make in models.items()}


def _evaluate(
    model: Any, tasks: Sequence[str], data: Path, split: str, *, limit: int | None, seed: int
) -> dict[str, Any]:
    """Run lm-eval in this process, without its bars: errors still raise."""
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    manager = TaskManager(
        include_path=str(tasks_directory()),
        include_defaults=False,
        metadata={"data": str(data), "split": split},
    )
    random.seed(seed)
    numpy.random.seed(seed)
    torch.manual_seed(seed)
    with contextlib.redirect_stderr(io.StringIO()):
        loaded = manager.load(list(tasks))
        for task in loaded["tasks"].values():
            if task.get_config("num_fewshot") is None:
                task.set_config(key="num_fewshot", value=0)
        # Not simple_evaluate: after each evaluation it describes the machine and asks git, which takes over a second.
        results: dict[str, Any] = evaluate(model, loaded, limit=limit, bootstrap_iters=0, log_samples=False)
    return results

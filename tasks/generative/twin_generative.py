"""Functions that the generative tasks' YAML files name: prompts, and scores with standard errors."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from twin_bench.data.generative import GENERATIVE
from twin_bench.data.metrics import mean
from twin_bench.data.metrics import mean_standard_error as mean_stderr
from twin_bench.data.rows import few_shot_pool, task_rows
from twin_bench_lm_eval.errors import one_line_errors
from twin_bench_lm_eval.tasks import text_documents, text_results

__all__ = ["dataset", "mean", "mean_stderr", "process_results"]

one_line_errors()


def dataset(
    generative_task: str, data: str | None = None, split: str | None = None, shots: int | None = None, **_: Any
) -> dict[str, Any]:
    """Return a task's documents as {"rows": Dataset} with columns prompt, answer, options, task and idx.

    `data`, `split` and `shots` come from the model's arguments or from --metadata. `data` is a directory of
    TASK/SPLIT.jsonl; without it TWIN_BENCH_DATA is used, and without that the hub. `split` is validation by default.
    `shots` is the number of few-shot examples, by default the task's own: five, or none for a summary. The order of the
    rows is drawn from a seed, so that --limit N takes a fair sample.
    """
    from datasets import Dataset

    task = GENERATIVE[generative_task]
    named = data or os.environ.get("TWIN_BENCH_DATA")
    directory = Path(named) if named else None
    rows = task_rows(task, split or "validation", directory)
    return {"rows": Dataset.from_list(text_documents(task, rows, few_shot_pool(task, directory, shots), shots))}


def process_results(doc: dict[str, Any], results: Sequence[str]) -> dict[str, float]:
    """Return a row's scores, each under the metric's name and under the name of its standard error."""
    return text_results(GENERATIVE[doc["task"]], doc, results)

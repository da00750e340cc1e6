"""Functions that the GLUE tasks' YAML files name: rows, and scores with standard errors.

Each task has one metric under two names, for example `mcc` and `mcc_stderr`. lm-eval has no standard error for a custom
metric and writes "N/A" under the key `mcc_stderr,none`. A metric named `mcc_stderr`, scored after the first, puts the
value there, where the results' table and its readers look for it. (lm-eval's own `mcc` and `f1` would take 100,000
resamples, which takes minutes.)
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from twin_bench.data.glue import GLUE, GlueTask
from twin_bench.data.metrics import score, standard_error
from twin_bench.data.rows import hub_rows, read_rows, split_path
from twin_bench.data.task import Row, joined
from twin_bench_lm_eval.errors import one_line_errors

one_line_errors()


def dataset(glue_task: str, data: str | None = None, split: str | None = None, **_: Any) -> dict[str, Any]:
    """Return a task's documents as {"rows": Dataset} with columns text, text_pair, label, task and idx.

    `data` and `split` come from the model's arguments or from --metadata. `data` is a directory of TASK/SPLIT.jsonl;
    without it TWIN_BENCH_DATA is used, and without that the hub's nyu-mll/glue. `split` is validation by default.
    """
    from datasets import Dataset

    task, split = GLUE[glue_task], split or "validation"
    directory = data or os.environ.get("TWIN_BENCH_DATA")
    rows = read_rows(split_path(Path(directory), task.name, split), task) if directory else hub_rows(task, split)
    return {"rows": Dataset.from_list([_document(row, position, task) for position, row in enumerate(rows)])}


def _document(row: Row, position: int, task: GlueTask) -> dict[str, Any]:
    text, pair = task.texts(row)
    label = float(row["label"]) if task.is_regression else row["label"]
    return {
        "text": text,
        "text_pair": pair,
        "label": label,
        "task": task.name,
        "idx": row.get("idx", position),
    }


def context(doc: dict[str, Any]) -> str:
    """Return the document's text unchanged. The second text of a pair is on a line of its own."""
    return joined(doc["text"], doc["text_pair"])


def labels(doc: dict[str, Any]) -> list[str]:
    """Return the ids of the task's labels as text."""
    return [str(label) for label in range(GLUE[doc["task"]].num_labels)]


def process_results(doc: dict[str, Any], results: Sequence[Any]) -> dict[str, tuple[float, float]]:
    """Return (reference, prediction) under the metric's name and under the name of its standard error.

    The prediction is a label's number, or the value of a regression. If no label has a probability, the prediction is
    -1, which is always wrong. This happens if the routed protocol chose a head that lacks all of the labels.
    """
    task = GLUE[doc["task"]]
    if task.is_regression:
        prediction = float(results[0])
    else:
        likelihoods = [log_probability for log_probability, _ in results]
        best = max(likelihoods)
        prediction = likelihoods.index(best) if best > -math.inf else -1
    pair = (doc["label"], prediction)
    return {task.metric: pair, f"{task.metric}_stderr": pair}


Pairs = Sequence[tuple[float, float]]


def _aggregation(statistic: Callable[..., float], metric: str) -> Callable[[Pairs], float]:
    def aggregate(pairs: Pairs) -> float:
        references, predictions = zip(*pairs, strict=True)
        return statistic(metric, references, predictions) / 100  # lm-eval's scores are from 0 to 1

    return aggregate


mcc, mcc_stderr = _aggregation(score, "mcc"), _aggregation(standard_error, "mcc")
acc, acc_stderr = _aggregation(score, "acc"), _aggregation(standard_error, "acc")
acc_f1, acc_f1_stderr = _aggregation(score, "acc_f1"), _aggregation(standard_error, "acc_f1")
pearson_spearman = _aggregation(score, "pearson_spearman")
pearson_spearman_stderr = _aggregation(standard_error, "pearson_spearman")

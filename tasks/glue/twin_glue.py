"""Functions that the GLUE tasks' YAML files name: rows, and scores with standard errors."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from twin_bench.data.glue import GLUE
from twin_bench.data.rows import task_rows
from twin_bench_lm_eval.errors import one_line_errors
from twin_bench_lm_eval.tasks import Answered, label_document, label_results, score, standard_error
from twin_bench_lm_eval.tasks import label_context as context

__all__ = ["context", "dataset", "labels", "process_results"]

one_line_errors()


def dataset(glue_task: str, data: str | None = None, split: str | None = None, **_: Any) -> dict[str, Any]:
    """Return a task's documents as {"rows": Dataset} with columns text, text_pair, label, task and idx.

    `data` and `split` come from the model's arguments or from --metadata. `data` is a directory of TASK/SPLIT.jsonl;
    without it TWIN_BENCH_DATA is used, and without that the hub's nyu-mll/glue. `split` is validation by default.
    """
    from datasets import Dataset

    task, named = GLUE[glue_task], data or os.environ.get("TWIN_BENCH_DATA")
    rows = task_rows(task, split or "validation", Path(named) if named else None)
    return {"rows": Dataset.from_list([label_document(row, position, task) for position, row in enumerate(rows)])}


def labels(doc: dict[str, Any]) -> list[str]:
    """Return the ids of the task's labels as text."""
    return [str(label) for label in range(GLUE[doc["task"]].num_labels)]


def process_results(doc: dict[str, Any], results: Sequence[Any]) -> dict[str, Answered]:
    """Return (reference, answer, source) under the metric's name and under the name of its standard error."""
    return label_results(GLUE[doc["task"]], doc, results)


mcc, mcc_stderr = score("mcc"), standard_error("mcc")
acc, acc_stderr = score("acc"), standard_error("acc")
acc_f1, acc_f1_stderr = score("acc_f1"), standard_error("acc_f1")
pearson_spearman, pearson_spearman_stderr = score("pearson_spearman"), standard_error("pearson_spearman")

"""A harness' answers without the harness: classifiers are asked for all rows at once, in a fraction of its time."""

from __future__ import annotations

import hashlib
from typing import Any

import pytest

from twin_bench.contenders import Contender
from twin_bench.data.metrics import find_metric
from twin_bench.leaderboard.harness import Evaluated, Job
from twin_bench.results.samples import Samples
from twin_bench_lm_eval.harness import LmEval


def ask_directly(patch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    """Let classifiers answer without lm-eval. Return the list of jobs and tasks, which grows with each cell."""
    jobs: list[tuple[str, str]] = []

    def score(_: Any, contender: Contender, job: Job) -> Evaluated:
        jobs.append((job.name, job.asked.task.name))
        return answers(contender, job)

    patch.setattr(LmEval, "score", score)
    return jobs


def answers(contender: Contender, job: Job) -> Evaluated:
    """Return a classifier's score on a task, with its samples."""
    task, rows = job.asked.task, job.asked.read(job.asked.split)[: job.rows]
    asked = job.asked.scored_inputs(job.rows)
    texts = [(one.text, one.text_pair) for one in asked]
    logits = [row.logits for row in contender.twin.classify(texts, [one.task for one in asked], batch_size=32)]
    found = [float(row[0]) if task.is_regression else int(row.argmax()) for row in logits]
    targets = [task.expected(row) for row in rows]
    samples = Samples(
        identities=[hashlib.sha256(repr(text).encode()).hexdigest() for text in texts],
        predictions=found,
        targets=targets,
        scores=[task.row_score(answer, target) for answer, target in zip(found, targets, strict=True)],
        pooled="metric",
        texts=[text for text, _ in texts],
    )
    unit = 100 if find_metric(task.metric).percent else 1
    error = find_metric(task.metric).standard_error(targets, found) / unit
    return Evaluated(samples.score(task.metric), error, len(rows), samples, model_seconds=0.001 * len(rows))

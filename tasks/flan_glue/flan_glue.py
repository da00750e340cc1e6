"""Functions that the tasks of GLUE as text name: how many rows train a router, and how STS-B's numbers are scored."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from datasets import Dataset

from twin_bench.data.metrics import score

TRAINING_ROWS = 6000
"""A router takes 5,500 rows of a task. lm-eval needs 2 ms for each prompt, and MNLI alone has 393,000 rows."""


def documents(rows: Dataset) -> Dataset:
    """Return the rows that are scored, or as many training rows as routers need, drawn by a seed."""
    drawn = rows.split == "train" and len(rows) > TRAINING_ROWS
    return rows.shuffle(seed=0).select(range(TRAINING_ROWS)) if drawn else rows


def process_results(doc: Mapping[str, Any], results: Sequence[str]) -> dict[str, tuple[float, float]]:
    """Return a row's reference, rounded as the experts were trained to write it, and its answer."""
    return {"spearman": (float(f"{doc['label']:.1f}"), _number(results[0]))}


def spearman(pairs: Sequence[tuple[float, float]]) -> float:
    """Return Spearman's correlation of all rows' references and answers, -1 to 1."""
    references, answers = zip(*pairs, strict=True)
    return score("spearman", references, answers) / 100


def _number(answer: str) -> float:
    """Return the number that an answer is, and 0 for an answer that is none, as FusionBench does."""
    try:
        number = float(answer)
    except ValueError:
        return 0.0
    return number if math.isfinite(number) else 0.0

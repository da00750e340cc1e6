"""Functions that the STS-B task of GLUE as text names: a number is read from the answer, and scored by its rank."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from twin_bench.data.metrics import score


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

"""What protocols, tracks and the constant answer are, in words: docs/protocols.md, shortened."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

CONSTANT = "the most frequent training label, or the mean of the training rows' numbers"
"""What the constant answer gives for every row of a task."""
CAUTIONS = {
    "paper": (
        "Protocol paper tells the model the true task's head and all biases of the true task's expert, and chooses the "
        "router on the rows that are scored."
    )
}
"""What must be known of the answer under a protocol that tells a model what no user can."""
PROTOCOLS = {
    "standard": (
        "Each task is scored with its own head. Biases are fused like all other parameters. The router was chosen on a "
        "held-out part of the training rows. Judge a method by this protocol."
    ),
    "paper": f"The authors' own evaluation. {CAUTIONS['paper']}",
    "routed": (
        "The head is that of the expert with the largest weight. Biases are fused like all other parameters. The "
        "router was chosen on a held-out part of the training rows."
    ),
}
TRACKS = {
    "bound": "Nothing is merged: the pretrained model, the experts, a constant answer.",
    "data-free": "The method sees weights alone.",
    "calibration": "The method sees statistics of training inputs.",
    "test-time": "The method sees the unlabelled rows that are scored.",
    "per-input": "The method sees each input, when it is answered.",
    "task-id given": "The method is told the task of each input.",
}


def seeds(identity: Mapping[str, Any]) -> str:
    """Return which seeds a run had, `seed 0` or `seeds 0 to 2 where a method draws, else 0`."""
    first, several = identity["seed"], identity.get("seeds", 1)
    if several == 1:
        return f"seed {first}"
    return f"seeds {first} to {first + several - 1} where a method draws, else {first}"

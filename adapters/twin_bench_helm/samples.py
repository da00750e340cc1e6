"""What HELM says of a run's rows: their scores, and what a twin answered to each."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from twin_bench.errors import InputError, RefusedError, nearest
from twin_bench.files import digest
from twin_bench.results.samples import Samples
from twin_bench.serving.engine import Answer, Ask, Engine
from twin_bench.serving.prompts import encoded
from twin_bench.twin.causal import TwinCausalLM
from twin_bench.twin.requests import Progress

IDENTITY = 32
"""The number of hexadecimal digits of a row's identity."""


class KeepingEngine(Engine):
    """An engine that keeps each prompt's fusion weights, and the seconds that its answers took, routing included."""

    def __init__(self, twin: TwinCausalLM, batch_size: int, task: str | None = None) -> None:
        """Make an engine that has answered nothing: see `Engine`."""
        super().__init__(twin, batch_size, task)
        self.fusion_weights: dict[tuple[int, ...], tuple[float, ...]] = {}
        self.seconds = 0.0

    def answer(self, requests: Sequence[Ask], progress: Progress | None = None) -> list[Answer]:
        """Return the answer to each request, in order: see `Engine.answer`."""
        begun = time.perf_counter()
        answers = super().answer(requests, progress)
        self.seconds += time.perf_counter() - begun
        for request, answer in zip(requests, answers, strict=True):
            if not isinstance(answer, RefusedError):
                self.fusion_weights[request.prompt] = answer[0].weights
        return answers


@dataclass(frozen=True)
class HelmScores:
    """The rows' own scores (0 to 1) on one task, and HELM's own mean of each run entry with its number of rows.

    `set_aside` says why some rows could not be answered. HELM scores them as empty answers. A metric that HELM computes
    of all rows at once, such as a corpus's BLEU, has no value of a row: not `of_rows`, and each row has HELM's mean.
    `states` are the rows' requests and results as HELM stores them: of several requests about a row, the first.
    """

    values: list[float]
    means: dict[str, tuple[float, int]]
    set_aside: list[str]
    states: list[Mapping[str, Any]]
    of_rows: bool = True


def read_scores(runs: Sequence[Path], metric: str, split: str | None) -> HelmScores:
    """Return the scores of some runs on one split: by default the test rows, or else the valid ones.

    Raises InputError if HELM has no such statistic of them.
    """
    found = HelmScores([], {}, [], [])
    of_rows = True
    for run in runs:
        stats = json.loads((run / "stats.json").read_text())
        of_splits = {stat["name"].get("split"): stat["mean"] for stat in stats if _is_plain(stat["name"], metric)}
        scored = split or next((name for name in ("test", "valid") if name in of_splits), None)
        if scored not in of_splits:
            known = sorted({stat["name"]["name"] for stat in stats if stat["name"].get("split") in ("test", "valid")})
            raise InputError(f"{run.name}: HELM has no metric {metric!r}{nearest(metric, known)}")
        states = json.loads((run / "scenario_state.json").read_text())["request_states"]
        first: dict[tuple[str, int], Mapping[str, Any]] = {}
        for state in states:
            if not state["instance"].get("perturbation"):
                first.setdefault((state["instance"]["id"], state["train_trial_index"]), state)
        own = [
            (stat["mean"], first[instance["instance_id"], instance["train_trial_index"]])
            for instance in json.loads((run / "per_instance_stats.json").read_text())
            if not instance.get("perturbation")
            for stat in instance["stats"]
            if stat["name"]["name"] == metric and stat["name"].get("split") == scored
        ]
        if not own:
            of_rows = False
            rows = {state["instance"]["id"]: state for state in first.values() if state["instance"]["split"] == scored}
            own = [(of_splits[scored], state) for state in rows.values()]
        found.values.extend(value for value, _ in own)
        found.states.extend(state for _, state in own)
        found.means[run.name] = of_splits[scored], len(own)
        found.set_aside.extend(
            f"{state['instance']['id']}: {state['result']['error']}"
            for state in states
            if not state["result"]["success"]
        )
    return HelmScores(found.values, found.means, found.set_aside, found.states, of_rows)


def _is_plain(name: Mapping[str, Any], metric: str) -> bool:
    """Whether a statistic is a metric's own, of no perturbation and no part of the rows."""
    return name["name"] == metric and name.keys() <= {"name", "split"}


def samples_of(scores: HelmScores, engine: KeepingEngine) -> Samples:
    """Return the rows with their answers, in the order of HELM's statistics.

    A row's identity is the digest of its input and its references: BBQ asks one text with several options. An option
    stands for itself by its letter. Where HELM asks each option in a request of its own, the prediction is empty. A
    row that was not answered has an empty prediction too, and NaN as its weights.
    """
    twin, states = engine.twin, scores.states
    names = () if twin.routing == "none" else twin.expert_names
    texts = [state["request"]["prompt"] for state in states]
    unknown = (math.nan,) * len(names)
    own = [engine.fusion_weights.get(tuple(encoded(twin.tokenizer, text, templated=False)), unknown) for text in texts]
    return Samples(
        identities=[_identity(state["instance"]) for state in states],
        predictions=[_prediction(state) for state in states],
        targets=[_target(state) for state in states],
        scores=scores.values if scores.of_rows else [math.nan] * len(states),
        pooled="mean" if scores.of_rows else None,
        weights={name: [weights[place] for weights in own] for place, name in enumerate(names)},
        texts=texts,
    )


def _identity(instance: Mapping[str, Any]) -> str:
    references = [reference["output"]["text"] for reference in instance["references"]]
    return digest([instance["input"]["text"], references])[:IDENTITY]


def _prediction(state: Mapping[str, Any]) -> str:
    """Return the completion: the text, or the letter of an option."""
    completions = state["result"]["completions"]
    separate = state.get("reference_index") is not None
    return "" if separate or not completions else str(completions[0]["text"]).strip()


def _target(state: Mapping[str, Any]) -> str:
    """Return the first right reference: its letter if the options have letters, or else its text."""
    references = state["instance"]["references"]
    right = next((place for place, one in enumerate(references) if "correct" in one["tags"]), None)
    if right is None:
        return ""
    letters = list(state.get("output_mapping") or ())
    return letters[right] if letters else str(references[right]["output"]["text"]).strip()

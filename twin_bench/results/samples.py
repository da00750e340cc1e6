"""Samples: what a method answered to each row of a task, kept as a parquet file beside the cell that it makes."""

from __future__ import annotations

import io
import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from twin_bench.data.metrics import find_metric, mean, mean_standard_error
from twin_bench.errors import InputError, first_line
from twin_bench.files import write_bytes

FORMAT = 1
"""The format of a file of samples. It is raised when its columns or their meaning change."""
WEIGHT = "weight_"
"""What stands before an expert's name in the column of its fusion weights."""
Pooled = Literal["mean", "metric"]
"""How a task's score is made of its rows: the mean of their scores, or the metric of all predictions and targets."""


@dataclass(frozen=True)
class Samples:
    """The rows of a task with a method's answers, in the order in which they were scored. All columns are (n,).

    `identities` are digests of the rows' inputs, without few-shot examples: the same for every method and every run.
    `predictions` and `targets` are label ids, numbers, lists of probabilities or texts. `scores` are the rows' own
    scores: a text's score from 0 to 1; 1 or 0 for a right or wrong label; the probability of the right label; the
    squared error of a number. `clusters` are the rows' sources, if the task has some. `weights` are the fusion weights
    of each expert, if the model has any. `texts` are the inputs. `pooled` says how the task's score is made of the
    rows, and is None if it is made in a way that only the harness knows.
    """

    identities: Sequence[str]
    predictions: Sequence[Any]
    targets: Sequence[Any]
    scores: Sequence[float]
    pooled: Pooled | None
    clusters: Sequence[str] | None = None
    weights: Mapping[str, Sequence[float]] = field(default_factory=dict)
    texts: Sequence[str] | None = None

    def score(self, metric: str) -> float:
        """Return the task's score, made of the rows as `pooled` says, in the metric's own unit.

        `metric` is the name of the task's metric. A task whose score only the harness can make has none: ValueError.
        """
        if self.pooled == "mean":
            return mean(self.scores)
        if self.pooled is None:
            raise ValueError("the harness alone makes this score of its rows")
        found = find_metric(metric)
        return found.score(self.targets, self.predictions) / (100 if found.percent else 1)

    def standard_error(self, metric: str) -> float:
        """Return the standard error of `score`, over draws of the rows or of their clusters."""
        if self.pooled == "mean":
            return mean_standard_error(self.scores, self.clusters)
        found = find_metric(metric)
        error = found.standard_error(self.targets, self.predictions, clusters=self.clusters)
        return error / (100 if found.percent else 1)

    def only(self, identities: Collection[str]) -> Samples:
        """Return the samples of those rows whose identity is among `identities`."""
        kept = [place for place, identity in enumerate(self.identities) if identity in identities]

        def taken(column: Sequence[Any]) -> list[Any]:
            return [column[place] for place in kept]

        return Samples(
            taken(self.identities),
            taken(self.predictions),
            taken(self.targets),
            taken(self.scores),
            self.pooled,
            None if self.clusters is None else taken(self.clusters),
            {name: taken(own) for name, own in self.weights.items()},
            None if self.texts is None else taken(self.texts),
        )

    def without_texts(self) -> Samples:
        """Return the samples without the rows' inputs."""
        return replace(self, texts=None)

    def frame(self) -> pd.DataFrame:
        """Return the columns `identity`, `prediction`, `target`, `score`, and those of `cluster`, weights and `text`.

        Fusion weights are float32 and have a column weight_EXPERT each.
        """
        columns: dict[str, Any] = {
            "identity": list(self.identities),
            "prediction": list(self.predictions),
            "target": list(self.targets),
            "score": pd.array(self.scores, dtype="float64"),
        }
        if self.clusters is not None:
            columns["cluster"] = [str(cluster) for cluster in self.clusters]
        columns |= {f"{WEIGHT}{name}": pd.array(own, dtype="float32") for name, own in self.weights.items()}
        if self.texts is not None:
            columns["text"] = list(self.texts)
        return pd.DataFrame(columns)


def write_samples(file: Path, samples: Samples) -> None:
    """Write samples as a compressed parquet file, atomically. Its pages have checksums, and it names its columns."""
    table = pa.Table.from_pandas(samples.frame(), preserve_index=False)
    notes = json.dumps({"format": FORMAT, "pooled": samples.pooled, "columns": table.column_names})
    table = table.replace_schema_metadata({**(table.schema.metadata or {}), b"twin_bench": notes.encode()})
    content = io.BytesIO()
    pq.write_table(table, content, compression="zstd", write_page_checksum=True)
    write_bytes(file, content.getvalue())


def read_samples(file: Path) -> Samples:
    """Read samples. InputError that names the file if it is missing, damaged or of another format."""
    try:
        table = pq.read_table(file, page_checksum_verification=True)
        notes = json.loads(table.schema.metadata[b"twin_bench"])
        found, pooled, named = notes["format"], notes["pooled"], notes.get("columns", table.column_names)
        binary = any(map(pa.types.is_binary, table.schema.types))  # texts whose mark in the header is damaged
        if table.column_names != named or pooled not in ("mean", "metric", None) or binary:
            raise ValueError("its header is damaged")
        columns = {name: table.column(name).to_pylist() for name in named}
    except (OSError, KeyError, TypeError, ValueError, pa.ArrowException) as error:
        raise InputError(
            f"{file}: no samples can be read ({first_line(error)}); run the leaderboard again, which scores what is "
            "missing"
        ) from None
    if found != FORMAT:
        raise InputError(f"{file}: samples of format {found}, and this version reads {FORMAT}; run it again")
    return Samples(
        identities=columns["identity"],
        predictions=columns["prediction"],
        targets=columns["target"],
        scores=columns["score"],
        pooled=pooled,
        clusters=columns.get("cluster"),
        weights={name.removeprefix(WEIGHT): own for name, own in columns.items() if name.startswith(WEIGHT)},
        texts=columns.get("text"),
    )

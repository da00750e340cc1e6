"""The eight GLUE tasks in one table: fields, labels, metrics, splits, named as in the hub's nyu-mll/glue."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class GlueTask:
    """One task: which fields of a row hold its text, what its labels are, what scores it.

    `fields` holds one name for a single sentence and two for a pair; `metric` is one of
    `twin_bench.metrics.METRICS`; `label_names` is in the order of the ids, and empty for a regression.
    """

    name: str
    fields: tuple[str, ...]
    metric: str
    label_names: tuple[str, ...] = ()

    @property
    def num_labels(self) -> int:
        """Size of the task's head: the number of labels, 1 for a regression."""
        return len(self.label_names) or 1

    @property
    def is_regression(self) -> bool:
        """Whether the label is a number to be predicted, not one of several classes."""
        return not self.label_names

    def hub_split(self, split: str) -> str:
        """Return the hub's name of `split`: MNLI's validation and test rows are the matched ones."""
        return f"{split}_matched" if self.name == "mnli" and split in ("validation", "test") else split


# The order is the task ids' order in the paper: cola 0 ... rte 7.
GLUE: dict[str, GlueTask] = {
    task.name: task
    for task in (
        GlueTask("cola", ("sentence",), "mcc", ("unacceptable", "acceptable")),
        GlueTask("sst2", ("sentence",), "acc", ("negative", "positive")),
        GlueTask("mrpc", ("sentence1", "sentence2"), "acc_f1", ("not_equivalent", "equivalent")),
        GlueTask("stsb", ("sentence1", "sentence2"), "pearson_spearman"),
        GlueTask("qqp", ("question1", "question2"), "acc_f1", ("not_duplicate", "duplicate")),
        GlueTask("mnli", ("premise", "hypothesis"), "acc", ("entailment", "neutral", "contradiction")),
        GlueTask("qnli", ("question", "sentence"), "acc", ("entailment", "not_entailment")),
        GlueTask("rte", ("sentence1", "sentence2"), "acc", ("entailment", "not_entailment")),
    )
}

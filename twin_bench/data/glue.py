"""The eight GLUE tasks in one table: fields, metrics and labels, named as in the hub's nyu-mll/glue."""

from __future__ import annotations

from twin_bench.data.classification import Classification

HUB = "nyu-mll/glue"
_MATCHED = {"validation": "validation_matched", "test": "test_matched"}
_SENTENCES = ("sentence1", "sentence2")

# The order is the task ids' order in the paper: cola 0 ... rte 7.
_TABLE: tuple[tuple[str, tuple[str, ...], str, tuple[str, ...]], ...] = (
    ("cola", ("sentence",), "mcc", ("unacceptable", "acceptable")),
    ("sst2", ("sentence",), "acc", ("negative", "positive")),
    ("mrpc", _SENTENCES, "acc_f1", ("not_equivalent", "equivalent")),
    ("stsb", _SENTENCES, "pearson_spearman", ()),
    ("qqp", ("question1", "question2"), "acc_f1", ("not_duplicate", "duplicate")),
    ("mnli", ("premise", "hypothesis"), "acc", ("entailment", "neutral", "contradiction")),
    ("qnli", ("question", "sentence"), "acc", ("entailment", "not_entailment")),
    ("rte", _SENTENCES, "acc", ("entailment", "not_entailment")),
)
GLUE: dict[str, Classification] = {
    name: Classification(
        name, fields, metric, labels, expert=name, hub=(HUB, name), hub_splits=_MATCHED if name == "mnli" else {}
    )
    for name, fields, metric, labels in _TABLE
}

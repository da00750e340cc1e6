"""lm-eval tasks made of this project's: documents, requests, answers, and scores with standard errors.

lm-eval has no standard error for a metric of one's own and writes "N/A" under the key `mcc_stderr,none`. So each score
has a second metric, named `mcc_stderr` and scored after the first, which puts the value there, where the results' table
and its readers look for it. (lm-eval's own `mcc` and `f1` would take 100,000 resamples, which takes minutes.)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial, singledispatch
from typing import Any

from datasets import Dataset
from lm_eval.api.task import ConfigurableTask

from twin_bench.data.classification import Classification
from twin_bench.data.generative import GenerativeTask, shuffled
from twin_bench.data.metric import Metric
from twin_bench.data.metrics import find_metric, mean, mean_standard_error, rouge_2
from twin_bench.data.rows import TaskRows
from twin_bench.data.task import Row, Task, joined

Pair = tuple[float, Any]
"""A document's reference, and its answer: a label, the probabilities of the labels, or a number."""


@singledispatch
def lm_eval_task(task: Task, rows: TaskRows) -> ConfigurableTask:
    """Return a task with its rows as a task of lm-eval's, which scores it under the task's own name."""
    raise TypeError(f"{type(task).__name__} does not say what lm-eval asks")


@lm_eval_task.register
def _(task: Classification, rows: TaskRows) -> ConfigurableTask:
    regression = {
        "output_type": "generate_until",
        "generation_kwargs": {"until": ["\n"], "do_sample": False},
    }
    labels = {"output_type": "multiple_choice", "doc_to_choice": [str(label) for label in range(task.num_labels)]}
    scores = {
        task.metric: aggregation(task.metric),
        f"{task.metric}_stderr": aggregation(task.metric, Metric.standard_error),
    }
    return _configured(
        task,
        [label_document(row, position, task) for position, row in enumerate(rows.read(rows.split))],
        scores,
        doc_to_text=label_context,
        doc_to_target="label",
        process_results=partial(label_results, task),
        **(regression if task.is_regression else labels),
    )


@lm_eval_task.register
def _(task: GenerativeTask, rows: TaskRows) -> ConfigurableTask:
    scores: dict[str, Callable[..., float]] = {task.metric: mean, f"{task.metric}_stderr": mean_standard_error}
    read = rows.read(rows.split)
    documents = text_documents(task, read, rows.pool())
    if all(doc["options"] for doc in documents):
        scores["chance"] = mean
    return _configured(
        task,
        documents,
        scores,
        output_type="generate_until",
        generation_kwargs={"until": list(task.until), "max_gen_toks": task.max_new_tokens, "do_sample": False},
        doc_to_text="prompt",
        doc_to_target="answer",
        process_results=partial(text_results, task),
    )


def _configured(
    task: Task, documents: Sequence[Mapping[str, Any]], scores: Mapping[str, Callable[..., float]], **config: Any
) -> ConfigurableTask:
    dataset = {"rows": Dataset.from_list([dict(document) for document in documents])}
    metrics = [{"metric": name, "aggregation": score, "higher_is_better": True} for name, score in scores.items()]
    return ConfigurableTask(
        config={
            "task": task.name,
            "custom_dataset": lambda **_: dataset,
            "test_split": "rows",
            "num_fewshot": 0,
            "metric_list": metrics,
            **config,
        }
    )


def label_document(row: Row, position: int, task: Classification) -> dict[str, Any]:
    """Return a classifier's document: its texts, the label's id or number, and the expert whose head answers."""
    text, pair = task.texts(row)
    return {
        "text": text,
        "text_pair": pair,
        "label": task.target(row),
        "task": task.owner,
        "idx": row.get("idx", position),
    }


def label_context(doc: Mapping[str, Any]) -> str:
    """Return the document's text unchanged. The second text of a pair is on a line of its own."""
    return joined(doc["text"], doc["text_pair"])


def label_results(task: Classification, doc: Mapping[str, Any], results: Sequence[Any]) -> dict[str, Pair]:
    """Return (reference, answer) under the metric's name and under the name of its standard error.

    If no label has a probability, the predicted label is -1, which is always wrong. This happens if the routed protocol
    chose a head that lacks all of the labels. A label that the chosen head lacks has the probability 0.
    """
    answer: Any
    if task.is_regression:
        answer = float(results[0])
    else:
        likelihoods = [log_probability for log_probability, _ in results]
        best = max(likelihoods)
        if find_metric(task.metric).answers == "probabilities":
            answer = [math.exp(value) for value in likelihoods]
        else:
            answer = likelihoods.index(best) if best > -math.inf else -1
    pair = (doc["label"], answer)
    return {task.metric: pair, f"{task.metric}_stderr": pair}


def aggregation(metric: str, statistic: Callable[..., float] = Metric.score) -> Callable[[Sequence[Pair]], float]:
    """Return a function of all documents' pairs: the score, or with `Metric.standard_error` its error.

    Both are in the metric's own unit, which is 0 to 1 where it is a fraction.
    """

    def aggregate(pairs: Sequence[Pair]) -> float:
        references, answers = zip(*pairs, strict=True)
        found = find_metric(metric)
        return statistic(found, references, answers) / (100 if found.percent else 1)

    return aggregate


def text_documents(
    task: GenerativeTask, rows: Sequence[Row], pool: Sequence[Row], shots: int | None = None
) -> list[dict[str, Any]]:
    """Return a generative task's documents, in the order in which they are scored."""
    documents = []
    for position, row in shuffled(enumerate(rows)):
        item = task.item(row)
        documents.append(
            {
                "prompt": task.prompt(row, task.examples(row, pool, shots)),
                "answer": item.answer,
                "options": item.options,
                "task": task.name,
                "idx": position,
            }
        )
    return documents


def text_results(task: GenerativeTask, doc: Mapping[str, Any], results: Sequence[str]) -> dict[str, float]:
    """Return a document's scores, each under the metric's name and under the name of its standard error.

    A question with options also has the score `chance`, one over their number.
    """
    text = results[0].strip()
    value = rouge_2(doc["answer"], text) if task.metric == "rouge_2" else float(text == doc["answer"])
    scores = {task.metric: value, f"{task.metric}_stderr": value}
    return scores if not doc["options"] else {**scores, "chance": 1 / doc["options"]}

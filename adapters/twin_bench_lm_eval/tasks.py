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
from twin_bench.data.metrics import find_metric, mean, mean_standard_error, rouge_2
from twin_bench.data.rows import TaskRows
from twin_bench.data.task import Row, Task, joined

Answered = tuple[float, Any, Any]
"""A document's reference, its answer (a label, the labels' probabilities, or a number), and its source or None."""


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
        task.metric: score(task.metric),
        f"{task.metric}_stderr": standard_error(task.metric),
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
    error = mean_standard_error if task.cluster is None else text_standard_error
    scores: dict[str, Callable[..., float]] = {task.metric: mean, f"{task.metric}_stderr": error}
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
        **({} if task.cluster is None else {"cluster": row[task.cluster]}),
    }


def label_context(doc: Mapping[str, Any]) -> str:
    """Return the document's text unchanged. The second text of a pair is on a line of its own."""
    return joined(doc["text"], doc["text_pair"])


def label_results(task: Classification, doc: Mapping[str, Any], results: Sequence[Any]) -> dict[str, Answered]:
    """Return (reference, answer, source) under the metric's name and under the name of its standard error.

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
    answered = (doc["label"], answer, doc.get("cluster"))
    return {task.metric: answered, f"{task.metric}_stderr": answered}


def score(metric: str) -> Callable[[Sequence[Answered]], float]:
    """Return the function of all documents' answers that is their score, 0 to 1 where the metric is a fraction."""

    def aggregate(answered: Sequence[Answered]) -> float:
        references, answers, _ = zip(*answered, strict=True)
        found = find_metric(metric)
        return found.score(references, answers) / (100 if found.percent else 1)

    return aggregate


def standard_error(metric: str) -> Callable[[Sequence[Answered]], float]:
    """Return the function of all documents' answers that is the standard error of their `score`."""

    def aggregate(answered: Sequence[Answered]) -> float:
        references, answers, sources = zip(*answered, strict=True)
        found, clusters = find_metric(metric), None if sources[0] is None else sources
        return found.standard_error(references, answers, clusters=clusters) / (100 if found.percent else 1)

    return aggregate


def text_standard_error(values: Sequence[tuple[float, Any]]) -> float:
    """Return the standard error of the mean of documents' values, of which each comes with its source."""
    scores, sources = zip(*values, strict=True)
    return mean_standard_error(scores, sources)


def text_documents(
    task: GenerativeTask, rows: Sequence[Row], pool: Sequence[Row], shots: int | None = None
) -> list[dict[str, Any]]:
    """Return a generative task's documents, in the order in which they are scored."""
    documents = []
    for position, row in shuffled(enumerate(rows)):
        item = task.item(row)
        documents.append(
            {
                "question": item.question,
                "prompt": task.prompt(row, task.examples(row, pool, shots)),
                "answer": item.answer,
                "options": item.options,
                "task": task.name,
                "idx": position,
                **({} if task.cluster is None else {"cluster": row[task.cluster]}),
            }
        )
    return documents


def text_results(task: GenerativeTask, doc: Mapping[str, Any], results: Sequence[str]) -> dict[str, Any]:
    """Return a document's scores, each under the metric's name and under the name of its standard error.

    A question with options also has the score `chance`, one over their number.
    """
    text = results[0].strip()
    value = rouge_2(doc["answer"], text) if task.metric == "rouge_2" else float(text == doc["answer"])
    scores = {task.metric: value, f"{task.metric}_stderr": (value, doc["cluster"]) if "cluster" in doc else value}
    return scores if not doc["options"] else {**scores, "chance": 1 / doc["options"]}

"""The four generative tasks: how a row becomes a prompt and its answer, by the paper's protocol in HELM.

MMLU, TruthfulQA (mc_single) and BBQ are multiple choice (HELM's multiple_choice_joint). The prompt holds all options
after five few-shot examples, and the answer is a letter. CNN/DailyMail asks for three sentences.
"""

from __future__ import annotations

import random
import string
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, TypeVar

from twin_bench.data.metrics import rouge_2
from twin_bench.data.task import LANGUAGE_MODELS, Asking, HubSplit, Row, Task, TaskInput, TaskType, require_cluster
from twin_bench.errors import InputError, first_line, nearest, shown

Drawn = TypeVar("Drawn")


@dataclass(frozen=True)
class Item:
    """A row as a question: `question` ends where the answer begins, and `answer` is the expected answer.

    `options` is the number of answers to choose from. It is 0 for a free text.
    """

    question: str
    answer: str
    options: int


@dataclass(frozen=True)
class GenerativeTask(Task):
    """One task: the form of its rows and its metric.

    A row must have the fields `fields`, and `item` makes an Item of it. `shots` few-shot examples stand before the
    question. If `group` names a field (MMLU: the subject), they have the same value of it. `hub` is (data set,
    configuration, split to score, split of examples) on the hub, or None if it is not there. If the split of examples
    is None, a tenth of the rows is set aside for examples. An answer ends with one of the texts `until`, or after
    `max_new_tokens`. `article` names the field of the text that is to be summarised, if one is.
    """

    name: str
    metric: str
    fields: tuple[str, ...]
    item: Callable[[Row], Item]
    instructions: Callable[[Row], str]
    hub: tuple[str, str, str, str | None] | None = None
    shots: int = 5
    group: str | None = None
    until: tuple[str, ...] = ("\n",)
    max_new_tokens: int = 1
    expert: str | None = None
    split: str | None = None
    cluster: str | None = None
    article: str | None = None
    suits: ClassVar[tuple[TaskType, ...]] = LANGUAGE_MODELS

    def prompt(self, row: Row, examples: Sequence[Row]) -> str:
        """Return what the model is asked: instructions, few-shot examples, and the row's question."""
        answered = [f"{item.question} {item.answer}\n\n" for item in map(self.item, examples)]
        return self.instructions(row) + "".join(answered) + self.item(row).question

    def examples(self, row: Row, pool: Sequence[Row], shots: int | None = None) -> list[Row]:
        """Return the few-shot examples for `row`: the first rows of `pool` in its group, without the row itself."""
        count = self.shots if shots is None else shots
        own = (other for other in pool if self.group is None or other[self.group] == row[self.group])
        picked: list[Row] = []
        for other in own:
            if len(picked) == count:
                break
            if any(other[field] != row[field] for field in self.fields):
                picked.append(other)
        return picked

    def asked(self, asking: Asking) -> GenerativeTask:
        """Return the task with the expert, split, number of examples and cluster that a suite gives it."""
        if asking.metric not in (None, self.metric):
            raise InputError(
                f"metric {asking.metric!r}: {self.name} is scored by {self.metric} alone; leave metric out"
            )
        if asking.hub is not None and (self.hub is None or asking.hub[0] != self.hub[0]):
            raise InputError(
                f"{self.name}: its rows are those of {self.hub[0] if self.hub else 'no data set'} on the hub, not "
                f"{asking.hub[0]}; write data: hub, or give a directory"
            )
        shots = self.shots if asking.few_shot is None else asking.few_shot
        return replace(self, expert=asking.expert, shots=shots, split=asking.split, cluster=asking.cluster)

    def check(self, row: Row, where: str) -> None:
        """Raise an InputError that begins with `where` unless `row` has the task's form."""
        for field in self.fields:
            if field not in row:
                raise InputError(f"{where}: no field {field!r}{nearest(field, row)}")
        try:
            item = self.item(row)
            self.instructions(row)
        except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
            raise InputError(
                f"{where}: not a row of {self.name} ({type(error).__name__}: {first_line(error)})"
            ) from None
        if not item.answer.strip() or item.options == 1:
            raise InputError(f"{where}: no answer, or only one option; {self.name} needs an answer and options")
        require_cluster(row, self.cluster, where)

    def inputs(self, rows: Sequence[Row], pool: Sequence[Row]) -> list[TaskInput]:
        """Return the rows' prompts, few-shot examples included."""
        return [TaskInput(self.prompt(row, self.examples(row, pool)), None, self.owner) for row in rows]

    def training_inputs(self, rows: Iterable[tuple[str, Row]], pool: Sequence[Row]) -> Iterator[TaskInput]:
        """Yield the rows' prompts. Every other prompt has few-shot examples, as in scoring; the others have none."""
        for index, (where, row) in enumerate(rows):
            self.check(row, where)
            examples = self.examples(row, pool) if index % 2 else []
            yield TaskInput(self.prompt(row, examples), None, self.owner)

    def answer(self, row: Row) -> str:
        """Return the text that a language model should answer."""
        return self.item(row).answer

    def expected(self, row: Row) -> str | None:
        """Return the right option's letter, or None if the answer is a free text."""
        item = self.item(row)
        return item.answer if item.options else None

    def row_score(self, answer: Any, target: Any) -> float:
        """Return the score of one row, 0 to 1: exact match, or ROUGE-2."""
        return rouge_2(target, answer) if self.metric == "rouge_2" else super().row_score(answer, target)

    def scoring_order(self, rows: Sequence[Row]) -> list[Row]:
        """Return rows in an order drawn from a seed, so that the first N are a fair sample of them."""
        return shuffled(rows)

    @property
    def has_dev(self) -> bool:
        """Whether the data set on the hub has a split of few-shot examples."""
        return self.hub is not None and self.hub[3] == "dev"

    def hub_split(self, split: str) -> HubSplit:
        """Return where the rows are. `train` is the split of the few-shot examples, and so is `dev` if there is one."""
        if self.hub is None:
            raise InputError(f"{self.name}: its rows are on no hub; give data: a directory of {{task}}/{{split}}.jsonl")
        if split not in ("train", "validation", *(["dev"] if self.has_dev else [])):
            raise InputError(
                f"{self.name}: no split {split!r}; use validation, which is scored, or train, which has examples"
            )
        dataset, configuration, scored, examples = self.hub
        return HubSplit(dataset, configuration, scored if split == "validation" else (examples or scored))

    def of_hub_split(self, rows: Sequence[Row], split: str) -> list[Row]:
        """Return all rows of the split. Without a split of examples, `train` is a tenth of them, drawn by a seed."""
        if self.hub is None or self.hub[3] is not None:
            return list(rows)
        drawn = shuffled(rows)
        aside = len(drawn) // 10
        return drawn[:aside] if split == "train" else drawn[aside:]


def shuffled(rows: Iterable[Drawn], seed: int = 0) -> list[Drawn]:
    """Return rows in an order drawn from a seed, so that the first N are a fair sample of them."""
    drawn = list(rows)
    random.Random(seed).shuffle(drawn)
    return drawn


def _choice(lead: str, options: Sequence[str], correct: int) -> Item:
    if not 0 <= correct < len(options) or len(options) > len(string.ascii_uppercase):
        raise IndexError(f"answer {correct} of {len(options)} options")
    letters = string.ascii_uppercase[: len(options)]
    lettered = "".join(f"{letter}. {option.strip()}\n" for letter, option in zip(letters, options, strict=True))
    return Item(f"{lead}\n{lettered}Answer:", letters[correct], len(options))


def _mmlu(row: Row) -> Item:
    return _choice(f"Question: {row['question'].strip()}", _listed(row["choices"]), _index(row["answer"]))


def _truthfulqa(row: Row) -> Item:
    choices, labels = row["mc1_targets"]["choices"], row["mc1_targets"]["labels"]
    order = list(range(len(choices)))
    random.Random(row["question"]).shuffle(order)  # the correct option is the first in the source
    options = [_listed(choices)[index] for index in order]
    if len(labels) != len(choices):
        raise IndexError(f"{len(labels)} labels for {len(choices)} choices")
    return _choice(f"Question: {row['question'].strip()}", options, [labels[index] for index in order].index(1))


def _bbq(row: Row) -> Item:
    lead = f"Passage: {row['context'].strip()}\nQuestion: {row['question'].strip()}"
    return _choice(lead, [row[f"ans{index}"] for index in range(3)], _index(row["label"]))


def _cnn_dailymail(row: Row) -> Item:
    article = " ".join(row["article"].split()[:512])
    question = f"###\nArticle: {article}\n\nSummarize the above article in 3 sentences.\n"
    return Item(question, row["highlights"].strip(), 0)


def _listed(value: Any) -> list[Any]:
    if not isinstance(value, list):
        raise TypeError(f"{shown(value)} is not a list of choices")
    return value


def _index(value: Any) -> int:
    if type(value) is not int:
        raise TypeError(f"{shown(value)} is not a whole number")
    return value


GENERATIVE: dict[str, GenerativeTask] = {
    task.name: replace(task, expert=task.name)
    for task in (
        GenerativeTask(
            name="mmlu",
            metric="exact_match",
            fields=("question", "choices", "answer", "subject"),
            item=_mmlu,
            instructions=lambda row: (
                "The following are multiple choice questions (with answers) about "
                f"{row['subject'].replace('_', ' ')}.\n\n"
            ),
            hub=("cais/mmlu", "all", "test", "dev"),
            group="subject",
        ),
        GenerativeTask(
            name="truthfulqa",
            metric="exact_match",
            fields=("question", "mc1_targets"),
            item=_truthfulqa,
            instructions=lambda row: "",
            hub=("truthfulqa/truthful_qa", "multiple_choice", "validation", None),
        ),
        GenerativeTask(
            name="bbq",
            metric="exact_match",
            fields=("context", "question", "ans0", "ans1", "ans2", "label"),
            item=_bbq,
            instructions=lambda row: "The following are multiple choice questions (with answers).\n\n",
            hub=("oskarvanderwal/bbq", "All", "test", None),
        ),
        GenerativeTask(
            name="cnn_dailymail",
            metric="rouge_2",
            fields=("article", "highlights"),
            item=_cnn_dailymail,
            instructions=lambda row: "",
            hub=("abisee/cnn_dailymail", "3.0.0", "test", "validation"),
            shots=0,
            until=("###",),
            max_new_tokens=128,
            article="article",
        ),
    )
}

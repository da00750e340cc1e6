"""Drafts of a suite's tasks: what a folder's rows and lm-eval task files look like, with each guess said."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from twin_bench.checkpoints.found import Found, FoundExpert
from twin_bench.config import as_yaml, commented, top_level
from twin_bench.data.fields import Fields, guessed_fields
from twin_bench.data.registry import TASKS
from twin_bench.data.rows import TaskRows, read_json_lines, split_path
from twin_bench.data.task import CLASSIFIERS, Row, Task, TaskInput
from twin_bench.errors import InputError
from twin_bench.leaderboard.suite import TASK

SCORED = ("validation", "test")
"""The splits that can be scored. The first one that has a file is."""
SPLITS = ("train", *SCORED)
TASK_KEYS = {"dataset_path", "output_type", "doc_to_text", "include", "class"}
"""Keys of which an lm-eval task file has one beside `task`."""
Setting = tuple[str, Any, str]
"""A key, its value, and a comment."""


@dataclass(frozen=True)
class Draft:
    """A task as the suite will have it. `why` says why it can't be run yet: it is then written as comments.

    `trained` are its training rows as a router reads them, each with its expert.
    """

    name: str
    expert: str | None
    comment: str = ""
    settings: tuple[Setting, ...] = ()
    why: str = ""
    trained: tuple[TaskInput, ...] = ()

    def lines(self) -> list[str]:
        """Return the lines of the task's block."""
        mark = "  # " if self.why else "  "
        expert = "NAME" if self.why and self.expert is None else as_yaml(self.expert)
        pairs = [("expert", expert, self.comment), *((key, as_yaml(value), note) for key, value, note in self.settings)]
        return [
            *([f"  # {self.name} can't be run yet: {self.why}"] if self.why else []),
            f"{mark}{as_yaml(self.name)}:",
            *(f"{mark}  {key}: {value}{commented(note)}" for key, value, note in pairs),
        ]


def of_rows(rows: Path, found: Found) -> list[Draft]:
    """Return the tasks of a folder of {task}/{split}.jsonl. InputError for a file of rows that can't be read."""
    folders = sorted(path for path in rows.iterdir() if any(split_path(rows, path.name, s).is_file() for s in SPLITS))
    return [_of_rows(folder, found) for folder in folders]


def of_task_files(folder: Path, found: Found) -> dict[Path, Draft]:
    """Return the tasks of the lm-eval task files in a folder and two levels below it, by their files."""
    drafts = {}
    for depth in ("*.yaml", "*/*.yaml", "*/*/*.yaml"):
        for file in sorted(folder.glob(depth)):
            said = top_level(file)
            if (name := said.get("task")) and TASK_KEYS & said.keys():
                expert, comment = _owner(name, found.experts)
                comment = comment or ("" if expert else "no expert is named like it: it is read against the base model")
                drafts[file] = Draft(name, expert.name if expert else None, comment)
    return drafts


def _of_rows(folder: Path, found: Found) -> Draft:
    rows = {
        split: [row for _, row in read_json_lines(file)]
        for split in SPLITS
        if (file := folder / f"{split}.jsonl").is_file()
    }
    expert, comment = _owner(folder.name, found.experts)
    owner = expert.name if expert else None
    known = TASKS.get(folder.name)
    if known is not None and found.kind in known.suits and _fits(known, rows):
        read = [*TaskRows(known, folder.parent, SCORED[0]).training_inputs()] if "train" in rows else []
        settings, problem = list[Setting](), ""
        comment = f"{comment}; " * bool(comment) + "the task itself is known"
    else:
        fields = guessed_fields([row for split in rows.values() for row in split])
        read = _inputs(fields, rows.get("train", []), pairs=found.kind in CLASSIFIERS)
        settings, problem = _settings(fields, expert, found)
    scored = next((split for split in SCORED if split in rows), None)
    if scored not in (None, SCORED[0]):
        settings.append(("split", scored, "the rows that are scored"))
    return Draft(
        folder.name,
        owner,
        comment,
        tuple(settings),
        _problem(folder, scored, expert, found) or problem,
        tuple(row._replace(task=owner) for row in read) if owner else (),
    )


def _problem(folder: Path, scored: str | None, expert: FoundExpert | None, found: Found) -> str:
    """Return why a task of these rows can't be run, if its fields do not matter; empty if it can."""
    if not TASK.fullmatch(folder.name):
        return "its name has other characters than letters, digits, '-', '_', '.' and '+'; rename the folder"
    if scored is None:
        return f"no {' or '.join(f'{split}.jsonl' for split in SCORED)} in {folder}"
    if expert is None and found.kind in CLASSIFIERS:
        names = ", ".join(expert.name for expert in found.experts)
        return f"no expert is named like it; say which of {names} was trained on it"
    return ""


def _owner(task: str, experts: Sequence[FoundExpert]) -> tuple[FoundExpert | None, str]:
    """Return the expert whose name is the task's, or the one of which one name contains the other; and a comment."""
    for expert in experts:
        if expert.name == task:
            return expert, ""
    plain = {expert.name: "".join(filter(str.isalnum, expert.name.lower())) for expert in experts}
    asked = "".join(filter(str.isalnum, task.lower()))
    near = [e for e in experts if min(len(asked), len(n := plain[e.name])) > 1 and (n in asked or asked in n)]
    return (near[0], "a guess by the names") if len(near) == 1 else (None, "")


def _fits(task: Task, rows: dict[str, list[Row]]) -> bool:
    """Return whether all rows are in the schema of a known task."""
    try:
        for split in rows.values():
            for row in split:
                task.check(row, "")
    except InputError:
        return False
    return True


def _inputs(fields: Fields | None, rows: Sequence[Row], *, pairs: bool) -> list[TaskInput]:
    """Return rows as a router's. A language model reads one text: the second one may hold the answer."""
    if fields is None:
        return []
    pair = fields.text_pair if pairs else None
    return [TaskInput(row[fields.text], row[pair] if pair else None, "") for row in rows]


def _settings(fields: Fields | None, expert: FoundExpert | None, found: Found) -> tuple[list[Setting], str]:
    """Return a task's settings of rows that nobody knows, and why it can't be run with them, if it can't."""
    if found.kind not in CLASSIFIERS:
        return [], "a language model's task needs an lm-eval task file, or a plugin"
    if fields is None:
        return [], "no field of its rows holds a text"
    others = f"a guess; also there: {', '.join(fields.others)}" if fields.others else "a guess"
    settings: list[Setting] = [("text", fields.text, others)]
    if fields.text_pair is not None:
        settings.append(("text_pair", fields.text_pair, "a guess; remove it if the model reads one text"))
    if fields.label is None:
        return settings, "no field of its rows looks like a label; name it with label"
    settings.append(("label", fields.label, "a guess"))
    labels, order = _labels(fields.values, expert)
    if len(labels) == 1:
        return settings, f"all its rows have the label {labels[0]!r}"
    if labels:
        settings += [("labels", list(labels), order), ("metric", "acc", "others are in docs/metrics.md")]
    else:
        settings.append(("metric", "pearson_spearman", "without labels, the label is a number to be predicted"))
    return settings, ""


def _labels(values: tuple[str | int, ...], expert: FoundExpert | None) -> tuple[tuple[str | int, ...], str]:
    """Return a task's labels in the order of the head's ids, none for a number to be predicted, and a comment."""
    own = expert.labels if expert else ()
    if len(own) == 1 or not values:
        return (), ""
    named = own if any(label != f"LABEL_{index}" for index, label in enumerate(own)) else ()
    if all(isinstance(value, int) for value in values):
        ids = range(len(own) or max(2, int(values[-1]) + 1))
        if set(values) <= set(ids) and (own or len(values) == len(ids)):
            return named or tuple(ids), "the rows hold the ids"
    folded = {str(value).lower(): value for value in values}
    if len(values) <= len(named) and folded.keys() <= {label.lower() for label in named}:
        return tuple(folded.get(label.lower(), label) for label in named), "in the order of id2label"
    return values, "a guess: sorted; the order must be that of the head's ids"

"""Rows of tasks, written as a user would have them on disk."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import torch

from tests.support.models import WORDS
from twin_bench.data.registry import TASKS as KNOWN
from twin_bench.data.rows import TaskRows

TASKS = ("cola", "stsb", "mnli")
"""The classifiers' tasks that tiny suites have: two labels, a number and three labels."""


def task_rows(data: Path, *names: str) -> list[TaskRows]:
    """Return known tasks whose rows are in `data`."""
    return [TaskRows(KNOWN[name], data, "validation") for name in names]


def write_router_rows(file: Path, tasks: list[str]) -> None:
    """Write 24 texts a task, each task's of words of its own, some of them shared with the next."""
    generator = torch.Generator().manual_seed(0)
    with file.open("w") as rows:
        for task_index, task in enumerate(tasks):
            for _ in range(24):
                share = WORDS[7 * task_index : 7 * task_index + 9]
                picked = torch.randint(len(share), (6,), generator=generator)
                text = " ".join(share[index] for index in picked)
                rows.write(f'{{"text": "{text}", "task": "{task}"}}\n')


def write_generative_rows(root: Path) -> Path:
    """Write the four generative tasks' rows, in their data sets' schemas: 12 to train and 7 to score of each."""
    draw = random.Random(0)

    def text(count: int) -> str:
        return " ".join(draw.choices(WORDS, k=count))

    for task in ("mmlu", "truthfulqa", "bbq", "cnn_dailymail"):
        (root / task).mkdir(parents=True)
        for split, size in (("train", 12), ("validation", 7)):
            lines = []
            for _ in range(size):
                options = [text(2) + str(index) for index in range(4)]
                row: dict[str, Any] = {"question": text(4)}
                if task == "mmlu":
                    row |= {"choices": options, "answer": draw.randrange(4)}
                    row |= {"subject": draw.choice(["world_religions", "anatomy"])}
                elif task == "truthfulqa":
                    row |= {"mc1_targets": {"choices": options[:3], "labels": [1, 0, 0]}}
                elif task == "bbq":
                    row |= {"context": text(5), "label": draw.randrange(3)}
                    row |= {f"ans{index}": options[index] for index in range(3)}
                else:
                    row = {"article": text(30), "highlights": text(6)}
                lines.append(json.dumps(row) + "\n")
            (root / task / f"{split}.jsonl").write_text("".join(lines))
    return root


def write_rows(root: Path) -> Path:
    """Write rows whose labels follow from the words, so that a random model's score is no constant."""
    draw = random.Random(0)
    for task in TASKS:
        (root / task).mkdir(parents=True)
        for split, count in (("train", 40), ("validation", 30)):
            with (root / task / f"{split}.jsonl").open("w") as file:
                for index in range(count):
                    first, second = (" ".join(draw.choices(WORDS, k=draw.randint(3, 9))) for _ in range(2))
                    row: dict[str, Any] = {"idx": index}
                    if task == "cola":
                        row |= {"sentence": first, "label": int("the" in first)}
                    elif task == "stsb":
                        row |= {"sentence1": first, "sentence2": second, "label": draw.uniform(0, 5)}
                    else:
                        row |= {"premise": first, "hypothesis": second, "label": len(second) % 3}
                    file.write(json.dumps(row) + "\n")
    return root

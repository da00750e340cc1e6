"""Task files of lm-eval's, as a user writes them."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import yaml
from lm_eval.tasks import TaskManager

from twin_bench.data.named import NamedTask
from twin_bench_lm_eval.named import Loaded, load

CHOICE = {
    "output_type": "multiple_choice",
    "doc_to_text": "{{question}} :",
    "doc_to_choice": "{{options}}",
    "doc_to_target": "answer",
    "metric_list": [{"metric": name, "aggregation": "mean", "higher_is_better": True} for name in ("acc", "acc_norm")],
}
TEXT = {
    "output_type": "generate_until",
    "doc_to_text": "{{question}} :",
    "doc_to_target": "{{options[answer]}}",
    "generation_kwargs": {"until": ["the"], "max_gen_toks": 4},
    "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
    "filter_list": [
        {"name": "whole", "filter": [{"function": "take_first"}]},
        {"name": "first", "filter": [{"function": "regex", "regex_pattern": r"(\w)"}, {"function": "take_first"}]},
    ],
}


def own_task(folder: Path, name: str, config: dict[str, Any], answers: int = 1) -> None:
    """Write a task of train, dev and test rows, of which each names its split. `!function` stays a tag in YAML.

    Of one answer all rows have the second option; of more, option after option is the right one.
    """
    files = {}
    for split, size in {"train": 9, "dev": 4, "test": 7}.items():
        files[split] = str(folder / f"{name}-{split}.jsonl")
        rows = [
            {"question": f"{split} {row}", "options": ["A", "B", "C"], "answer": 1 if answers == 1 else row % answers}
            for row in range(size)
        ]
        Path(files[split]).write_text("".join(json.dumps(row) + "\n" for row in rows))
    given = {"task": name, "dataset_path": "json", "dataset_kwargs": {"data_files": files}, "test_split": "test"}
    text = yaml.safe_dump({**given, **config})
    (folder / f"{name}.yaml").write_text(re.sub(r"'(!function [\w.]+)'", r"\1", text))


def loaded(folder: Path, name: str, **settings: Any) -> Loaded:
    manager = TaskManager(include_path=str(folder), include_defaults=False)
    return load(NamedTask(name, **settings), manager, unsafe_code=False, include_path=str(folder))

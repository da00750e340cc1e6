"""What a user does with names on the hub, in a process of its own: the hub's client reads its settings once.

`python -m tests.support.hub_session PLAN.json` does what the plan says and writes what happened to its `out`. The
variables HF_ENDPOINT, HF_HUB_OFFLINE and HF_HOME say where the hub and its cache are.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import yaml

from twin_bench.__main__ import main
from twin_bench.data import TASKS
from twin_bench.data.rows import hub_rows
from twin_bench.paths import tasks_directory

BUILT_IN = ("mmlu_anatomy", "truthfulqa_mc1", "truthfulqa_mc2", "gsm8k", "arc_easy", "wikitext", "glue")
OWN = ("twin_mmlu", "twin_truthfulqa", "twin_bbq", "twin_cnn_dailymail")


def commands(plan: dict[str, Any], out: Path) -> dict[str, int]:
    """Run the commands with the plan's recipes and suites; return their exit codes."""
    codes = {}
    for name, content in plan["files"].items():
        file, command = out / f"{name}.yaml", name.partition("-")[0]
        file.write_text(yaml.safe_dump(content))
        if command == "leaderboard":
            codes[name] = main(["leaderboard", "--suite", str(file), "--out", str(out / name)])
        else:
            codes[name] = main([command, str(file), str(out / name)])
    return codes


def scores(twin: Path, plain: str) -> dict[str, Any]:
    """Return lm-eval's scores of a twin on its built-in tasks and on this project's, and of a plain model."""
    import lm_eval
    import torch
    from lm_eval.tasks import TaskManager

    from tests.support.interpreter import START
    from torch.utils import collect_env

    exec(START, {})  # what the plugin's .pth does in an installation
    collect_env.get_pretty_env_info = lambda: ""  # runs pip and others for seconds
    torch.set_num_threads(1)
    manager = TaskManager(include_path=str(tasks_directory()))
    found = {}
    for model, arguments in (("twin_merged", f"pretrained={twin}"), ("hf", f"pretrained={plain}")):
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
        kept = {}
        for task, values in results["results"].items():
            kept[task] = {
                key: value for key, value in values.items() if isinstance(value, float) and "stderr" not in key
            }
        found[model] = kept
    return found


def run(plan: dict[str, Any]) -> dict[str, Any]:
    """Do all, and return what happened."""
    out = Path(plan["out"])
    out.mkdir()
    rows = {f"{task}/{split}": hub_rows(TASKS[task], split) for task, split in plan["rows"]}
    codes = commands(plan, out)
    return {"rows": rows, "codes": codes, "scores": scores(out / "build-language", plan["plain"])}


if __name__ == "__main__":
    given = json.loads(Path(sys.argv[1]).read_text())
    Path(given["done"]).write_text(json.dumps(run(given)))

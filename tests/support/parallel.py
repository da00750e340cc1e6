"""What `accelerate launch` runs in the test of data parallelism: one rank's share of an evaluation.

HFLM takes its rank from accelerate on several GPUs only; here the CPU's processes are given theirs.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import lm_eval
import torch
from lm_eval.tasks import TaskManager

from twin_bench.paths import tasks_directory
from twin_bench_lm_eval.causal import CausalTwin

TASKS = ["twin_mmlu", "twin_cnn_dailymail"]


class Ranked(CausalTwin):
    """A twin on a CPU that has a rank among the processes there are."""

    @property
    def rank(self) -> int:
        return int(self.accelerator.process_index) if hasattr(self, "accelerator") else 0

    @property
    def world_size(self) -> int:
        return int(self.accelerator.num_processes) if hasattr(self, "accelerator") else 1


def answers(twin: Path, data: Path) -> tuple[Ranked, dict[str, dict[str, Any]]]:
    """Return the model, and each task's scores, and its answers by the number of their row: complete on rank 0."""
    model = Ranked(twin, device="cpu", dtype="float32", batch_size=2)
    metadata = {"data": str(data), "shots": 1}
    manager = TaskManager(include_path=str(tasks_directory()), include_defaults=False, metadata=metadata)
    tasks = [*TASKS, choices(data)]
    results = lm_eval.simple_evaluate(model, tasks=tasks, task_manager=manager, bootstrap_iters=0, log_samples=True)
    if model.rank:
        return model, {}
    # A rank with a document less repeats its last request, and lm-eval logs the repeated answers too.
    return model, {
        task: {
            "scores": {name: score for name, score in results["results"][task].items() if "," in name},
            "answers": {
                str(sample["doc_id"]): [
                    one if isinstance(one, str) else float(one[0]) for one in sample["filtered_resps"]
                ]
                for sample in samples
            },
        }
        for task, samples in results["samples"].items()
    }


def choices(data: Path) -> dict[str, Any]:
    """Return a task that asks for the log-likelihoods of MMLU's choices: a tiny model's texts are all the same."""
    return {
        "task": "choices",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"validation": str(data / "mmlu" / "validation.jsonl")}},
        "validation_split": "validation",
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{answer}}",
        "metric_list": [{"metric": "acc"}],
    }


def main(twin: str, data: str, out: str) -> None:
    model, found = answers(Path(twin), Path(data))
    if not model.rank:
        Path(out).write_text(json.dumps({"processes": model.world_size, "tasks": found}))
    # A process that ends while the other still talks to it ends both with an abort.
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])

"""What `accelerate launch` runs in the test of data parallelism: one rank's share of an evaluation.

HFLM takes its rank from accelerate on several GPUs only; here the CPU's processes are given theirs.
"""

import json
import sys

import lm_eval
from lm_eval.tasks import TaskManager

from twin_bench.paths import tasks_directory
from twin_bench_lm_eval.causal import CausalTwin

twin, data, out = sys.argv[1:]
model = CausalTwin(twin, device="cpu", dtype="float32", batch_size=2)
model._max_length = 2048
if hasattr(model, "accelerator"):
    model._rank, model._world_size = model.accelerator.process_index, model.accelerator.num_processes
manager = TaskManager(include_path=str(tasks_directory()), include_defaults=False, metadata={"data": data, "shots": 1})
tasks = ["twin_mmlu", "twin_cnn_dailymail"]
results = lm_eval.simple_evaluate(model, tasks=tasks, task_manager=manager, bootstrap_iters=0, log_samples=True)
if model.rank == 0:
    # A rank with a document less repeats its last request, and lm-eval logs the repeated answers too.
    answers = {
        task: {str(s["doc_id"]): s["resps"][0][0] for s in samples} for task, samples in results["samples"].items()
    }
    with open(out, "w") as file:
        json.dump({"processes": model.world_size, "answers": answers}, file, sort_keys=True)

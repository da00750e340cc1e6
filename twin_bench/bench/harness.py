"""End to end: the documents a second that lm-eval scores with the twin, and with its own model on the plain weights."""

from __future__ import annotations

import contextlib
import io
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

from twin_bench.bench.measure import Case
from twin_bench.data.generative import GENERATIVE
from twin_bench.data.rows import task_rows
from twin_bench.paths import tasks_directory
from twin_bench.twin.causal import TwinCausalLM


def lm_eval_cases(
    twin: TwinCausalLM, plain: Any, data: Path, *, split: str, rows: int, batch_size: int
) -> dict[str, Case]:
    """Return `lm_eval_hf` and `lm_eval_twin`: the first `rows` documents of each task that the twin has an expert of.

    Both are what `lm_eval` runs once a model is loaded: prompts, requests, answers and scores; the twin's routing is
    counted. They raise ValueError where lm-eval isn't installed.

    Args:
        twin: a language model's.
        plain: the transformers model that `--model hf` gets: the shared expert.
        data: {task}/{split}.jsonl.
        split: which rows.
        rows: documents a task.
        batch_size: requests a forward, of both.
    """
    tasks = [name for name in GENERATIVE if name in twin.expert_names]
    documents = sum(len(task_rows(GENERATIVE[task], split, data)[:rows]) for task in tasks)

    def evaluate(model: Callable[[], Any]) -> None:
        try:
            from lm_eval import simple_evaluate
            from lm_eval.tasks import TaskManager
        except ImportError:
            raise ValueError("lm-eval is not installed: pip install 'twin-bench[lm-eval]'") from None
        logging.getLogger("lm_eval").setLevel(logging.ERROR)
        manager = TaskManager(
            include_path=str(tasks_directory()), include_defaults=False, metadata={"data": str(data), "split": split}
        )
        with contextlib.redirect_stderr(io.StringIO()):
            simple_evaluate(
                model=model(),
                tasks=[f"twin_{task}" for task in tasks],
                task_manager=manager,
                limit=rows,
                bootstrap_iters=0,
                log_samples=False,
            )

    def own() -> Any:
        from lm_eval.models.huggingface import HFLM

        return HFLM(pretrained=plain, tokenizer=twin.tokenizer, batch_size=batch_size)

    def ours() -> Any:
        from twin_bench_lm_eval.causal import CausalTwin

        return CausalTwin(twin=twin, batch_size=batch_size)

    return {
        "lm_eval_hf": Case(lambda: evaluate(own), documents, "lm_eval_hf"),
        "lm_eval_twin": Case(lambda: evaluate(ours), documents, "lm_eval_hf"),
    }

"""The cases of a language model's twin: generation and few-shot log-likelihoods, against plain transformers."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from twin_bench.bench.adapters import mixed_adapters
from twin_bench.bench.measure import Case, Cases, finished
from twin_bench.data.generative import GENERATIVE
from twin_bench.data.rows import few_shot_pool, task_rows
from twin_bench.errors import InputError
from twin_bench.leaderboard.harness import DEFAULT, find_harness
from twin_bench.twin.causal import TwinCausalLM
from twin_bench.twin.directory import load_twin
from twin_bench.twin.encoded import tokens
from twin_bench.twin.requests import Score, score

GENERATED = 32
PROMPT_TOKENS = 64
LETTERS = "ABCD"


def causal_cases(twin: TwinCausalLM, directory: Path, data: Path, *, split: str, rows: int, batch_size: int) -> Cases:
    """Return the cases of a language model's twin: those of `generation_cases`, `letter_cases` and `harness_cases`.

    The last ones need a router. They are optional, and so is PEFT's mixed batch.
    """
    plain: Any = load_twin(directory, dtype=twin.model.dtype).model.to(twin.device).eval()
    task, prompts = _prompts(twin, data, split, rows)
    whole = harness_cases(twin, plain, data, split=split, rows=rows, batch_size=batch_size) if twin.router else {}
    return Cases(
        {
            **generation_cases(twin, plain, directory, prompts, batch_size=batch_size),
            **letter_cases(twin, plain, task, prompts, batch_size=batch_size),
            **whole,
        },
        {"task": task, "mean_tokens": sum(map(len, prompts)) / len(prompts), "tolerance": twin.tolerance},
        optional={*whole, "peft_mixed"},
    )


def generation_cases(
    twin: TwinCausalLM, plain: Any, directory: Path, prompts: list[list[int]], *, batch_size: int
) -> dict[str, Case]:
    """Return the generation of 32 tokens after the last 64 tokens of `batch_size` prompts, in tokens a second.

    `plain` is transformers' own generation. `generate_diffuse` gives each row its own weights, drawn from a flat
    Dirichlet, and `generate_one_hot` one expert in turn. `generate_fused` gives all rows the same diffuse weights.
    `peft_mixed` is PEFT's mixed batch, which gives each row one expert's adapter in turn.
    """
    starts = torch.tensor([ids[-PROMPT_TOKENS:] for ids in (prompts * batch_size)[:batch_size]], device=twin.device)
    generator = torch.Generator().manual_seed(0)
    drawn = -torch.rand(batch_size, len(twin.expert_names), generator=generator).log()
    diffuse = drawn / drawn.sum(dim=1, keepdim=True)
    experts = [row % len(twin.expert_names) for row in range(batch_size)]
    one_hot = torch.nn.functional.one_hot(torch.tensor(experts), len(twin.expert_names)).float()
    adapted = mixed_adapters(directory, AutoModelForCausalLM, twin)
    options = {
        "max_new_tokens": GENERATED,
        "min_new_tokens": GENERATED,
        "do_sample": False,
        "pad_token_id": twin.tokenizer.pad_token_id,
    }

    def generate_plain() -> None:
        finished(plain.generate(input_ids=starts, attention_mask=torch.ones_like(starts), **options))

    def generate(weights: Tensor) -> None:
        finished(twin.generate(starts, fusion_weights=weights, **options))

    @torch.no_grad()
    def generate_mixed() -> None:
        names = [twin.expert_names[expert] for expert in experts]
        mask = torch.ones_like(starts)
        finished(adapted.generate(input_ids=starts, attention_mask=mask, adapter_names=names, **options))

    runs: dict[str, Callable[[], object]] = {
        "plain": generate_plain,
        "generate_diffuse": partial(generate, diffuse),
        "generate_one_hot": partial(generate, one_hot),
        "generate_fused": partial(generate, diffuse[:1].repeat(batch_size, 1)),
        "peft_mixed": generate_mixed,
    }
    return {name: Case(run, batch_size * GENERATED) for name, run in runs.items()}


def letter_cases(
    twin: TwinCausalLM, plain: Any, task: str, prompts: list[list[int]], *, batch_size: int
) -> dict[str, Case]:
    """Return the log-likelihoods of the letters that answer five-shot questions, in rows a second.

    `plain_letters` is transformers' forward of every prompt. `letters` is the twin with the true task's weights; it
    shares the prefix of prompts. `letters_routed` is the same with the router's weights at the twin's default
    tolerance, and its time includes routing.
    """
    letters = [twin.tokenizer.encode(f" {letter}", add_special_tokens=False)[:1] for letter in LETTERS]
    own = torch.zeros(len(twin.expert_names))
    own[twin.expert_names.index(task)] = 1.0

    @torch.no_grad()
    def plain_letters() -> None:
        for first in range(0, len(prompts), batch_size):
            inputs = twin.collate([tokens(ids) for ids in prompts[first : first + batch_size]])
            finished(plain(**inputs, use_cache=False, logits_to_keep=1).logits)

    def score_letters(weights: Tensor | None) -> None:
        requests = [Score(ids, letter) for ids in prompts for letter in letters]
        given = None if weights is None else weights.repeat(len(requests), 1)
        score(twin, requests, fusion_weights=given, batch_size=batch_size)

    routed = Case(lambda: score_letters(None), len(prompts), "plain_letters")
    return {
        "plain_letters": Case(plain_letters, len(prompts), "plain_letters"),
        "letters": Case(lambda: score_letters(own), len(prompts), "plain_letters"),
        **({"letters_routed": routed} if twin.router else {}),
    }


def harness_cases(
    twin: TwinCausalLM, plain: Any, data: Path, *, split: str, rows: int, batch_size: int
) -> dict[str, Case]:
    """Return whole evaluations through lm-eval: of the twin, and of lm-eval's own model on the plain weights.

    They score the first `rows` documents of each task that the twin has an expert of. If lm-eval is not installed, the
    case fails with a message that says so.
    """
    tasks = [name for name in GENERATIVE if name in twin.expert_names]
    documents = sum(len(task_rows(GENERATIVE[task], split, data)[:rows]) for task in tasks)
    try:
        harness = find_harness(DEFAULT)
    except InputError as error:
        reason = str(error)

        def missing() -> None:
            raise ValueError(reason)

        return {"lm_eval_hf": Case(missing, documents, "lm_eval_hf")}
    runs = harness.timed_runs(twin, plain, tasks, data, split=split, rows=rows, batch_size=batch_size)
    return {name: Case(run, documents, "lm_eval_hf") for name, run in runs.items()}


def _prompts(twin: TwinCausalLM, data: Path, split: str, rows: int) -> tuple[str, list[list[int]]]:
    """Return a multiple-choice task that the twin has an expert of, and its first `rows` prompts as tokens."""
    task = next((name for name in ("mmlu", "bbq", "truthfulqa") if name in twin.expert_names), None)
    if task is None:
        raise InputError("bench: the twin has no expert of a multiple-choice task to take prompts from")
    kind = GENERATIVE[task]
    examples = few_shot_pool(kind, data)
    asked = task_rows(kind, split, data)[:rows]
    return task, [twin.tokenizer(kind.prompt(row, kind.examples(row, examples)))["input_ids"] for row in asked]

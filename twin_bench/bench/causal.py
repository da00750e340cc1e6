"""What is measured of a language model's twin: generation and few-shot log-likelihoods, against plain transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from twin_bench.bench.harness import lm_eval_cases
from twin_bench.bench.measure import Case, Cases, finished
from twin_bench.data.generative import GENERATIVE
from twin_bench.data.rows import few_shot_pool, task_rows
from twin_bench.errors import InputError
from twin_bench.twin.causal import TwinCausalLM, tokens
from twin_bench.twin.directory import load_twin
from twin_bench.twin.requests import Score, score

GENERATED = 32
PROMPT_TOKENS = 64
LETTERS = "ABCD"


def causal_cases(twin: TwinCausalLM, directory: Path, data: Path, *, split: str, rows: int, batch_size: int) -> Cases:
    """Return the cases of a language model's twin.

    Generation of 32 tokens after the last 64 of `batch_size` prompts, tokens a second: `plain` is transformers' own,
    `generate_diffuse` gives each row weights of its own, drawn from a flat Dirichlet. Log-likelihoods of the letters
    that answer five-shot questions, rows a second: `plain_letters` is transformers' forward of every prompt,
    `letters` the twin with the true task's weights, which shares what prompts begin with, and `letters_routed` the
    same with its router's weights at the twin's default tolerance, routing counted. Last those of `lm_eval_cases`.
    """
    plain: Any = load_twin(directory, dtype=twin.model.dtype).model.to(twin.device).eval()
    task = next((name for name in ("mmlu", "bbq", "truthfulqa") if name in twin.expert_names), None)
    if task is None:
        raise InputError("bench: the twin has no expert of a multiple-choice task to take prompts of")
    kind = GENERATIVE[task]
    examples = few_shot_pool(kind, data)
    asked = task_rows(kind, split, data)[:rows]
    prompts = [twin.tokenizer(kind.prompt(row, kind.examples(row, examples)))["input_ids"] for row in asked]
    letters = [twin.tokenizer.encode(f" {letter}", add_special_tokens=False)[:1] for letter in LETTERS]
    starts = torch.tensor([ids[-PROMPT_TOKENS:] for ids in (prompts * batch_size)[:batch_size]], device=twin.device)
    generator = torch.Generator().manual_seed(0)
    drawn = -torch.rand(batch_size, len(twin.expert_names), generator=generator).log()
    options = {
        "max_new_tokens": GENERATED,
        "min_new_tokens": GENERATED,
        "do_sample": False,
        "pad_token_id": twin.tokenizer.pad_token_id,
    }
    own = torch.zeros(len(twin.expert_names))
    own[twin.expert_names.index(task)] = 1.0

    def generate_plain() -> None:
        finished(plain.generate(input_ids=starts, attention_mask=torch.ones_like(starts), **options))

    def generate_diffuse() -> None:
        finished(twin.generate(starts, fusion_weights=drawn / drawn.sum(dim=1, keepdim=True), **options))

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
    harness = lm_eval_cases(twin, plain, data, split=split, rows=rows, batch_size=batch_size) if twin.router else {}
    return Cases(
        {
            "plain": Case(generate_plain, batch_size * GENERATED),
            "generate_diffuse": Case(generate_diffuse, batch_size * GENERATED),
            "plain_letters": Case(plain_letters, len(prompts), "plain_letters"),
            "letters": Case(lambda: score_letters(own), len(prompts), "plain_letters"),
            **({"letters_routed": routed} if twin.router else {}),
            **harness,
        },
        {"task": task, "mean_tokens": sum(map(len, prompts)) / len(prompts), "tolerance": twin.tolerance},
        optional=harness.keys(),
    )

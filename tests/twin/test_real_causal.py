"""Real rows, a real language model, real LoRA experts: the twin against lm-eval's own model, and dense ones."""

from __future__ import annotations

import copy
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from twin_bench import TwinModel
from twin_bench.checkpoints.hub import model_directory
from twin_bench.data.generative import GENERATIVE, shuffled
from twin_bench.data.rows import read_rows, split_path
from twin_bench.twin.builder import build_twin
from twin_bench.twin.recipe import Recipe
from twin_bench_lm_eval.causal import CausalTwin

pytestmark = [pytest.mark.real, pytest.mark.slow]
BASE = "HuggingFaceTB/SmolLM2-135M-Instruct"
TASKS = ("mmlu", "truthfulqa", "bbq", "cnn_dailymail")
SHORT = {"until": ["###"], "max_gen_toks": 8, "do_sample": False}


@pytest.fixture(scope="module")
def build(real_data: Path, real_experts: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Return a function that builds the twin of some tasks' experts, whole: rank 8 each, over a shared expert."""

    def twin(*tasks: str) -> Path:
        directory = tmp_path_factory.mktemp("smollm2") / "twin"
        recipe = {
            "base_model": BASE,
            "experts": {task: str(real_experts / "smollm2" / task) for task in tasks},
            "shared": {"method": "task_arithmetic", "scaling": 0.3},
            "exclusive": {"rank": 8 * len(tasks)},
            "router": {"data": str(real_data), "layer": 1, "max_rows": 12, "epochs": 20, "paper": False},
            "max_length": 300,
        }
        build_twin(Recipe.model_validate(recipe), directory)
        return directory

    return twin


def prompts_of(data: Path, task: str, count: int) -> list[tuple[str, str]]:
    """Return (prompt without few-shot examples, answer) of some rows, the articles cut short."""
    rows = shuffled(read_rows(split_path(data, task), GENERATIVE[task]))[:count]
    if task == "cnn_dailymail":
        rows = [{**row, "article": " ".join(row["article"].split()[:60])} for row in rows]
    return [(GENERATIVE[task].prompt(row, []), GENERATIVE[task].item(row).answer) for row in rows]


def expert_alone(task: str, experts: Path) -> Any:
    """Return one expert as transformers and peft load it."""
    model = AutoModelForCausalLM.from_pretrained(model_directory(BASE))
    return PeftModel.from_pretrained(model, str(experts / "smollm2" / task)).merge_and_unload().eval()


def test_an_expert_alone_answers_every_request_as_lm_evals_own_model(
    build: Any, real_data: Path, real_experts: Path, tmp_path: Path
) -> None:
    """A twin of one expert, whose router can say nothing but 1, against --model hf on the merged checkpoint."""
    twin = CausalTwin(str(build("bbq")), batch_size=4)
    merged = expert_alone("bbq", real_experts)
    merged.save_pretrained(tmp_path / "merged")
    twin.tokenizer.save_pretrained(tmp_path / "merged")
    hf = HFLM(str(tmp_path / "merged"), device="cpu", batch_size=4)
    pairs = [(prompt, f" {letter}") for prompt, _ in prompts_of(real_data, "bbq", 3) for letter in "ABC"]
    pairs += [(prompt, answer) for prompt, answer in prompts_of(real_data, "cnn_dailymail", 1)]
    asked = [Instance("loglikelihood", {}, pair, index) for index, pair in enumerate(pairs)]
    for (found, greedy), (expected, hf_greedy) in zip(twin.loglikelihood(asked), hf.loglikelihood(asked), strict=True):
        assert abs(found - expected) <= 1e-4 * max(1, abs(expected) / 10)
        assert greedy == hf_greedy
    whole = [Instance("loglikelihood_rolling", {}, (pairs[0][0],), 0)]
    assert twin.loglikelihood_rolling(whole) == pytest.approx(hf.loglikelihood_rolling(whole), abs=2e-3)
    texts = [Instance("generate_until", {}, (prompt, SHORT), i) for i, (prompt, _) in enumerate(pairs[::3])]
    assert twin.generate_until(texts) == hf.generate_until(texts)


def test_a_shuffled_list_of_all_tasks_is_one_dense_model_a_request(build: Any, real_data: Path) -> None:
    """At batch sizes 1 and 4, against theta_s and the factors as saved, multiplied out and summed here."""
    directory = build(*TASKS)
    twin = TwinModel.from_pretrained(directory)
    pairs = [(prompt, f" {answer}") for task in TASKS for prompt, answer in prompts_of(real_data, task, 2)]
    pairs = [(prompt, answer[:60]) for prompt, answer in pairs]
    random.Random(0).shuffle(pairs)
    model = CausalTwin(str(directory), batch_size=4)
    asked = [Instance("loglikelihood", {}, pair, index) for index, pair in enumerate(pairs)]
    found = [score for score, _ in model.loglikelihood(asked)]
    model.batch_size_per_gpu = 1
    backwards = [score for score, _ in model.loglikelihood(asked[::-1])][::-1]
    assert found == pytest.approx(backwards, abs=1e-3)
    texts = model.generate_until([Instance("generate_until", {}, (p, SHORT), i) for i, (p, _) in enumerate(pairs)])

    base = AutoModelForCausalLM.from_pretrained(directory / "model")
    factors = [load_file(directory / "experts" / name / "adapter_model.safetensors") for name in twin.expert_names]
    assert not any(load_file(directory / "experts" / name / "vectors.safetensors") for name in twin.expert_names)
    for (prompt, answer), score, text in list(zip(pairs, found, texts, strict=True))[:4]:
        before = model.tok_encode(prompt)
        after = model.tok_encode(prompt + answer)[len(before) :]
        weights = twin.route(torch.tensor([before]))[0]
        assert 0.3 < float(weights.max()) < 1.0
        fused = with_factors(base, factors, weights)
        with torch.no_grad():
            logits = fused(torch.tensor([before + after[:-1]])).logits[0, -len(after) :]
        expected = logits.log_softmax(dim=-1)[range(len(after)), after].sum()
        assert score == pytest.approx(float(expected), abs=1e-3)
        ids = torch.tensor([model.tok_encode(prompt)])
        greedy = fused.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, do_sample=False)
        assert text == model.tok_decode(greedy[0, ids.shape[1] :]).split("###")[0]


def with_factors(base: Any, factors: list[dict[str, Tensor]], weights: Tensor) -> Any:
    model = copy.deepcopy(base)
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for weight, own in zip(weights, factors, strict=True):
            for key in own:
                if key.endswith("lora_A.weight"):
                    name = key.removeprefix("base_model.model.").replace("lora_A.", "")
                    parameters[name] += weight * own[key.replace("lora_A", "lora_B")] @ own[key]
    return model

"""The paper protocol of language models, against the authors' formulas written out for one sample at a time."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor

from tests.support.dense import mixes
from tests.support.families import Family
from tests.support.models import CAUSAL_VOCABULARY
from twin_bench import InputError, TwinModel
from twin_bench.checkpoints.sources import open_sources
from twin_bench.data.registry import TASKS
from twin_bench.twin.builder import ORACLE_PARAMETERS, build_twin
from twin_bench.twin.paper import AdapterStack, PaperFactors, authors_rank, install_paper_layers, merge_lora_factors
from twin_bench.twin.recipe import Recipe

RANK, ALPHA, SCALING = 4, 6, 0.3
TASKS_HERE = ("mmlu", "bbq", "cnn_dailymail")


@pytest.fixture(scope="module")
def lora(causal_families: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Family, Path, dict[str, Any]]:
    """Save a LoRA adapter a task on a tiny Llama, and rows with test rows; return their factors by module."""
    family, root = causal_families("llama"), tmp_path_factory.mktemp("lora")
    factors: dict[str, Any] = {}
    for seed, task in enumerate(TASKS_HERE):
        torch.manual_seed(seed)
        config = peft.LoraConfig(
            r=RANK, lora_alpha=ALPHA, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM"
        )
        adapted = peft.get_peft_model(copy.deepcopy(family.base), config)
        for name, parameter in adapted.named_parameters():
            if "lora_" in name:
                parameter.data.normal_(std=0.3)
        adapted.save_pretrained(root / task)
        for name, module in adapted.base_model.model.named_modules():
            if hasattr(module, "lora_A"):
                pair = module.lora_A["default"].weight.detach(), module.lora_B["default"].weight.detach()
                factors.setdefault(f"{name}.weight", {})[task] = tuple(side.double() for side in pair)
        row = {
            "mmlu": {"question": "cat", "choices": ["a", "the"], "answer": 0, "subject": "anatomy"},
            "bbq": {"context": "dog", "question": "who", "ans0": "a", "ans1": "the", "ans2": "cat", "label": 1},
            "cnn_dailymail": {"article": "small bird ran", "highlights": "ran"},
        }[task]
        (root / "data" / task).mkdir(parents=True)
        for split in ("train", "validation"):
            field = TASKS[task].fields[0]
            rows = [json.dumps({**row, field: f"{row[field]} {split} {i}"}) + "\n" for i in range(6)]
            (root / "data" / task / f"{split}.jsonl").write_text("".join(rows))
    return family, root, factors


@pytest.fixture(scope="module")
def directory(lora: Any) -> Path:
    family, root, _ = lora
    recipe = {
        "base_model": family.recipe["base_model"],
        "experts": {task: str(root / task) for task in TASKS_HERE},
        "shared": {"method": "task_arithmetic", "scaling": SCALING},
        "exclusive": {"rank": 2},
        "router": {"data": str(root / "data"), "epochs": 2},
        "max_length": 40,
    }
    build_twin(Recipe.model_validate(recipe), root / "twin")
    return root / "twin"


def truncated(matrix: Tensor, rank: int) -> Tensor:
    U, S, Vh = torch.linalg.svd(matrix)
    return U[:, :rank] @ torch.diag(S[:rank]) @ Vh[:rank]


def authors_model(lora: Any, weights: Tensor) -> Any:
    family, _, factors = lora
    model = copy.deepcopy(family.base).double()
    parameters = dict(model.named_parameters())
    for name, by_task in factors.items():
        fused = []
        for side in (0, 1):
            shared = SCALING * sum(by_task[task][side] for task in TASKS_HERE)
            own = [truncated(by_task[task][side] - shared, 2) for task in TASKS_HERE]
            fused.append(shared + sum(w * v for w, v in zip(weights.double(), own, strict=True)))
        with torch.no_grad():
            parameters[name] += ALPHA / RANK * fused[1] @ fused[0]
    return model


@pytest.mark.parametrize(("rate", "width", "rank"), [(0.9, 320, 31), (0.9, 768, 76), (0.8, 640, 127), (0.7, 640, 192)])
def test_lora_factors_are_cut_to_the_authors_rank(rate: float, width: int, rank: int) -> None:
    """The authors write the rate of what is dropped; with density 0.1, int(density * 320) would be 32."""
    assert authors_rank(torch.Size((2 * width, width)), round(1 - rate, 1)) == int((1 - rate) * width) == rank
    torch.manual_seed(0)
    stack = AdapterStack(torch.randn(2, 20, 24), torch.randn(2, 24, 20), 1.0)
    model = torch.nn.ModuleDict({"x": torch.nn.Linear(24, 24)})
    install_paper_layers(model, PaperFactors({"x.weight": stack}, 0.3, round(1 - rate, 1), None))
    own = [int(torch.linalg.matrix_rank(factor)) for factor in model["x"].get_buffer("A")[1:]]
    assert own == [int((1 - rate) * 20)] * 2


@pytest.mark.parametrize("mix", ["one_hot", "diffuse", "mixed", "equal", "none"])
def test_a_and_b_are_fused_separately(lora: Any, directory: Path, mix: str) -> None:
    twin = TwinModel.from_pretrained(directory, protocol="paper")
    ids = torch.randint(4, CAUSAL_VOCABULARY, (4, 9), generator=torch.Generator().manual_seed(0))
    weights = mixes(4, 3)[mix]
    found = twin(ids, fusion_weights=weights).logits
    for row in range(4):
        with torch.no_grad():
            expected = authors_model(lora, weights[row])(ids[row : row + 1]).logits[0]
        assert (found[row].double() - expected).norm() <= 2e-5 * expected.norm()
    if mix == "diffuse":
        standard = TwinModel.from_pretrained(directory)(ids, fusion_weights=weights).logits
        assert (standard - found).norm() > 0.01 * found.norm()


def test_the_router_reads_the_authors_shared_expert_and_is_chosen_on_test_rows(lora: Any, directory: Path) -> None:
    twin = TwinModel.from_pretrained(directory, protocol="paper")
    ids = torch.randint(4, CAUSAL_VOCABULARY, (2, 9), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        states = authors_model(lora, torch.zeros(3)).model(ids).last_hidden_state
    found = twin.features({"input_ids": ids, "attention_mask": torch.ones_like(ids)}, [-1])[0]
    torch.testing.assert_close(found.double(), states.mean(dim=1), rtol=1e-4, atol=1e-4)
    said = json.loads((directory / "twin.json").read_text())["router"]["paper"]
    assert said["selected_on"].startswith("test rows")
    assert said["selection_rows"] == 18
    assert twin.router.config.layer == -1


def test_static_merges_square_lambda(lora: Any) -> None:
    family, root, factors = lora
    sources = open_sources(family.recipe["base_model"], {task: str(root / task) for task in TASKS_HERE})
    merged = merge_lora_factors("task_arithmetic", sources.base, sources.experts, scaling=SCALING)
    base = dict(family.base.named_parameters())
    for name, tensor in merged.items():
        expected = base[name].detach().double()
        if name in factors:
            A, B = (sum(factors[name][task][side] for task in TASKS_HERE) for side in (0, 1))
            expected = expected + SCALING**2 * ALPHA / RANK * B @ A
        torch.testing.assert_close(tensor.double(), expected, rtol=1e-5, atol=1e-5)


def test_experts_that_cannot_be_added(lora: Any, causal_families: Any, tmp_path: Path) -> None:
    family, root, _ = lora
    torch.manual_seed(0)
    config = peft.LoraConfig(r=3, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM")
    peft.get_peft_model(copy.deepcopy(family.base), config).save_pretrained(tmp_path / "other")
    sources = open_sources(family.recipe["base_model"], {"mmlu": str(root / "mmlu"), "bbq": str(tmp_path / "other")})
    with pytest.raises(InputError, match="the adapters differ in rank or scale"):
        merge_lora_factors("average", sources.base, sources.experts)
    full = open_sources(family.recipe["base_model"], family.recipe["experts"])
    with pytest.raises(InputError, match="needs adapters on the same matrices"):
        merge_lora_factors("average", full.base, full.experts)
    build_twin(Recipe.model_validate({**family.recipe, "router": None}), tmp_path / "twin")
    with pytest.raises(InputError, match="protocol paper adds the factors of LoRA adapters"):
        TwinModel.from_pretrained(tmp_path / "twin", protocol="paper")


@pytest.mark.parametrize("more", [{"bits": 4}, {"from_layer": 1}])
def test_adapters_are_not_what_other_exclusive_vectors_would_be(
    lora: Any, tmp_path: Path, more: dict[str, int]
) -> None:
    """The protocol truncates the adapters itself: it would score a twin of other exclusive vectors than these."""
    family, root, _ = lora
    recipe = {
        "base_model": family.recipe["base_model"],
        "experts": {task: str(root / task) for task in TASKS_HERE},
        "shared": {"method": "task_arithmetic", "scaling": SCALING},
        "exclusive": {"rank": 2, **more},
    }
    build_twin(Recipe.model_validate(recipe), tmp_path / "twin")
    with pytest.raises(InputError, match="protocol paper adds the factors of LoRA adapters"):
        TwinModel.from_pretrained(tmp_path / "twin", protocol="paper")


def test_tokens_that_come_flattened_keep_their_rows() -> None:
    """OPT gives its MLP (batch * length, n); a single token a row is (batch, n)."""
    generator = torch.Generator().manual_seed(0)
    model = torch.nn.ModuleDict({"x": torch.nn.Linear(6, 5)})
    stack = AdapterStack(torch.randn(2, 3, 6, generator=generator), torch.randn(2, 5, 3, generator=generator), 1.0)
    fusion = install_paper_layers(model, PaperFactors({"x.weight": stack}, 0.3, None, 2))
    x = torch.randn(3, 4, 6, generator=generator)
    with torch.no_grad(), fusion.per_row(torch.randn(3, 2, generator=generator)):
        whole = model["x"](x)
        torch.testing.assert_close(model["x"](x.flatten(0, 1)), whole.flatten(0, 1))
        torch.testing.assert_close(model["x"](x[:, 0]), whole[:, 0])
    assert not torch.allclose(whole[0], model["x"](x)[0])


def test_a_table_of_relative_positions_is_no_bias() -> None:
    named = ["mpnet.encoder.layer.0.attention.attn.q.bias", "deberta.encoder.layer.0.attention.self.q_bias"]
    assert all(map(ORACLE_PARAMETERS.search, named))
    assert not ORACLE_PARAMETERS.search("mpnet.encoder.relative_attention_bias.weight")

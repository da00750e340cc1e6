"""Arrow against peft's own arrow model on the same adapters, and what it does not suit."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import peft
import pytest
import torch

from tests.support.contenders import served
from tests.support.families import Family
from twin_bench.errors import UnsuitedError
from twin_bench.merging.linear_algebra import product_svd

TARGETS = {"llama": ["q_proj", "down_proj"], "gpt2": ["c_attn", "c_fc"]}


def adapted(base: Any, folder: Path, seed: int, targets: list[str], rank: int = 3) -> str:
    """Save an adapter whose product has one large singular value, so that power iterations find its vector."""
    config = peft.LoraConfig(
        task_type="CAUSAL_LM", r=rank, lora_alpha=5, target_modules=targets, fan_in_fan_out="c_attn" in targets
    )
    model = peft.get_peft_model(copy.deepcopy(base), config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
                (parameter[0] if "lora_A" in name else parameter[:, 0]).mul_(4)
    model.save_pretrained(str(folder))
    return str(folder)


def suite_of(family: Family, experts: dict[str, str], folder: Path, **options: Any) -> dict[str, Any]:
    methods = [{"arrow": options}]
    base = family.recipe["base_model"]
    return {
        "name": "lm",
        "base_model": base,
        "experts": experts,
        "data": str(folder),
        "tasks": list(experts),
        "methods": methods,
    }


@pytest.mark.skipif(not hasattr(peft, "create_arrow_model"), reason="this peft has no Arrow")
@pytest.mark.parametrize("kind", list(TARGETS))
@pytest.mark.parametrize("top_k", [1, 2, 3])
def test_it_is_pefts_arrow_model(causal_families: Any, tmp_path: Path, kind: str, top_k: int) -> None:
    family: Family = causal_families(kind)
    names = list(family.experts)
    paths = {name: adapted(family.base, tmp_path / name, n, TARGETS[kind]) for n, name in enumerate(names)}
    made = served(suite_of(family, paths, tmp_path, top_k=top_k), "arrow", tmp_path / "work")
    config = peft.ArrowConfig(top_k=top_k, rng_seed=0)
    theirs = peft.create_arrow_model(copy.deepcopy(family.base), list(paths.values()), config).eval()
    ids = torch.randint(4, 200, (3, 9), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected, plain = theirs(input_ids=ids).logits, family.base(input_ids=ids).logits
        torch.testing.assert_close(made.twin(ids).logits, expected, rtol=1e-3, atol=1e-4)
    assert (expected - plain).abs().max() > 1e-2


def test_a_products_svd_comes_from_its_factors() -> None:
    generator = torch.Generator().manual_seed(0)
    B, A = (torch.randn(shape, generator=generator).double() for shape in ((9, 4), (4, 7)))
    B[:, 3] = B[:, 0]  # rank 3 at most once A's rows are alike as well
    A[3] = A[0]
    found, (_, S, Vh) = product_svd(B, A), torch.linalg.svd(B @ A)
    assert found.A.shape == (3, 7)
    torch.testing.assert_close(found.B @ found.A, B @ A)
    torch.testing.assert_close(found.A.norm(dim=1).square(), S[:3])
    torch.testing.assert_close((found.A[0] / found.A[0].norm() @ Vh[0]).abs(), torch.ones(()).double())
    assert product_svd(torch.zeros_like(B), A).A.shape == (0, 7)


def test_what_it_does_not_suit(causal_families: Any, tmp_path: Path) -> None:
    family: Family = causal_families("llama")
    one = adapted(family.base, tmp_path / "mmlu", 0, ["q_proj"])
    other = adapted(family.base, tmp_path / "bbq", 1, ["q_proj", "down_proj"])
    for experts, message in (
        ({"mmlu": one, "bbq": family.recipe["experts"]["bbq"]}, "expert 'bbq' is a full checkpoint"),
        ({"mmlu": one, "bbq": other}, "experts 'mmlu' and 'bbq' must adapt the same layers; model.layers"),
    ):
        with pytest.raises(UnsuitedError, match=message):
            served(suite_of(family, experts, tmp_path), "arrow", tmp_path / "work")

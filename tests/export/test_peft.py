"""PEFT computes the twin with weight 1 on an expert; what an adapter can't hold is named, and its loss measured."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from torch import Tensor

from tests.support.dense import batch, truncated
from tests.support.families import SCALING, Family, built
from twin_bench import InputError, TwinModel
from twin_bench.cli import main
from twin_bench.export.run import export_twin

IDS = batch(4)["input_ids"].clamp(min=4)


def adapted(twin: Path, folder: Path) -> Tensor:
    base = transformers.AutoModelForCausalLM.from_pretrained(twin / "model")
    with torch.no_grad():
        return peft.PeftModel.from_pretrained(base, folder).eval()(input_ids=IDS).logits


def fused(twin: Path, weights: Tensor) -> Tensor:
    model: Any = TwinModel.from_pretrained(twin)
    return model(IDS, fusion_weights=weights.repeat(len(IDS), 1)).logits


def ranks(folder: Path) -> set[int]:
    tensors = transformers.modeling_utils.load_state_dict(folder / "adapter_model.safetensors")
    return {len(tensor) for name, tensor in tensors.items() if "lora_A" in name}


@pytest.mark.parametrize("pad", [False, True])
def test_each_adapter_is_the_twin_with_weight_1_on_it(matrix_twin: Path, tmp_path: Path, pad: bool) -> None:
    options = {"pad_ranks": True} if pad else {}
    lines = export_twin(matrix_twin, tmp_path / "out", to="peft", weights=["calm=0.5,0.25,0"], **options)
    assert lines == [f"4 adapters on {matrix_twin / 'model'}"]
    chosen = {"mmlu": [1, 0, 0], "bbq": [0, 1, 0], "cnn_dailymail": [0, 0, 1], "calm": [0.5, 0.25, 0]}
    for name, weights in chosen.items():
        expected = fused(matrix_twin, torch.tensor(weights, dtype=torch.float32))
        torch.testing.assert_close(adapted(matrix_twin, tmp_path / "out" / name), expected, rtol=1e-4, atol=1e-5)
        config = json.loads((tmp_path / "out" / name / "adapter_config.json").read_text())
        assert config["r"] == config["lora_alpha"]
        if pad:
            assert (ranks(tmp_path / "out" / name), config["rank_pattern"]) == ({24}, {})
    if not pad:
        assert ranks(tmp_path / "out" / "mmlu") == {6, 12}  # int(0.5 * min(m, n)) of keys and of the others


def test_what_an_adapter_cannot_hold_is_refused_by_name(causal_twins: Any, tmp_path: Path) -> None:
    with pytest.raises(
        InputError, match=r"mmlu: an adapter can't hold model\.embed_tokens\.weight \(a table that lm_h"
    ):
        export_twin(causal_twins("llama"), tmp_path / "out", to="peft")
    with pytest.raises(InputError, match=r"layernorm\.weight and 1 more \(1-D, a bias or a norm\); give --leave-out"):
        export_twin(causal_twins("llama"), tmp_path / "out", to="peft", expert="bbq")
    assert not list(tmp_path.iterdir())


def without(family: Family, task: str, lost: list[str]) -> Any:
    """Return a dense model with an expert's exclusive vector, but for the 1-D tensors and those that are named."""
    theta_0 = {name: p.detach().double() for name, p in family.base.named_parameters()}
    thetas = {name: dict(model.named_parameters()) for name, model in family.experts.items()}
    model = copy.deepcopy(family.base).double()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            shared = theta_0[name] + SCALING * sum(theta[name].double() - theta_0[name] for theta in thetas.values())
            if parameter.ndim == 2 and name not in lost:
                shared = shared + truncated(task, name, thetas[task][name].double() - shared)
            parameter.copy_(shared)
    return model


def test_what_is_left_out_is_told_and_its_error_measured(
    causal_families: Any, causal_twins: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    family, twin, out = causal_families("llama"), causal_twins("llama"), tmp_path / "out"
    rows = tmp_path / "rows.jsonl"
    texts = ["the cat sat", "a dog ran", "why did it"]
    tasks = list(family.experts)
    rows.write_text("".join(f'{{"text": "{text}", "task": "{task}"}}\n' for text in texts for task in tasks))
    asked = ["export", str(twin), str(out), "--format", "peft", "--leave-out", "--data", str(rows)]
    assert main(asked) == 0
    said = capsys.readouterr().out
    reference = without(family, "bbq", ["model.embed_tokens.weight"])
    with torch.no_grad():
        expected = reference(input_ids=IDS).logits
    torch.testing.assert_close(adapted(twin, out / "bbq").double(), expected, rtol=1e-4, atol=1e-4)

    served: Any = TwinModel.from_pretrained(twin)
    weights, differences, changed = torch.tensor([0.0, 1, 0]), [], 0
    for text in texts:
        ids = served.tokenizer(text, return_tensors="pt")["input_ids"]
        whole = served(ids, fusion_weights=weights[None]).logits[0, -1].double()
        with torch.no_grad():
            cut = reference(input_ids=ids).logits[0, -1]
        differences.append((whole.log_softmax(0) - cut.log_softmax(0)).abs())
        changed += int(whole.argmax() != cut.argmax())
    each = torch.cat(differences)
    assert f"bbq: log-probabilities differ by {each.max():.3g} at most and {each.mean():.3g} on average" in said
    assert f"{changed} of 3 most probable answers change" in said
    assert "bbq: left out: model.embed_tokens.weight (a table that lm_head.weight shares); " in said
    card = (out / "README.md").read_text()
    assert "model.layers.1.post_attention_layernorm.weight" in card
    assert f"{each.max():.3g} at most" in card


@pytest.mark.parametrize("kind", ["bert", "gpt2"])
def test_a_classifier_s_adapter_has_its_head(twins: Any, tmp_path: Path, kind: str) -> None:
    twin = twins(kind)
    export_twin(twin, tmp_path / "out", to="peft", expert="mnli", leave_out=True)
    base = transformers.AutoModelForSequenceClassification.from_pretrained(twin / "model", num_labels=3)
    model = peft.PeftModel.from_pretrained(base, tmp_path / "out" / "mnli").eval()
    served: Any = TwinModel.from_pretrained(twin)
    for layer in served.fusion.layers:
        layer.vectors = layer.bias_vectors = None
    inputs = batch(4)
    with torch.no_grad():
        expected = served(**inputs, fusion_weights=torch.tensor([[0.0, 0, 1]]).repeat(4, 1), task="mnli").logits
        torch.testing.assert_close(model(**inputs).logits, expected, rtol=1e-4, atol=1e-5)


def test_quantised_factors_are_what_their_codes_stand_for(matrix_family: Family, tmp_path: Path) -> None:
    twin = built({**matrix_family.recipe, "exclusive": {"rank": 5, "bits": 8}, "router": None}, tmp_path / "twin")
    export_twin(twin, tmp_path / "out", to="peft", expert="bbq")
    expected = fused(twin, torch.tensor([0.0, 1, 0]))
    torch.testing.assert_close(adapted(twin, tmp_path / "out" / "bbq"), expected, rtol=1e-4, atol=1e-5)


def test_single_entries_are_refused(matrix_family: Family, tmp_path: Path) -> None:
    exclusive = {"kind": "magnitude", "density": 0.1}
    twin = built({**matrix_family.recipe, "exclusive": exclusive, "router": None}, tmp_path / "twin")
    with pytest.raises(InputError, match=r"q_proj\.weight, .* and 10 more \(no product of two factors"):
        export_twin(twin, tmp_path / "out", to="peft")
    with pytest.raises(InputError, match="nothing is left for an adapter without model"):
        export_twin(twin, tmp_path / "out", to="peft", leave_out=True)

"""The merged checkpoint of one vector of weights: transformers loads what a dense merge in float64 gives."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from tests.support.dense import batch, dense
from tests.support.families import built
from twin_bench import TwinModel
from twin_bench.cli import main
from twin_bench.export.run import export_twin

WEIGHTS = torch.tensor([0.2, 0.9, -0.3])


@pytest.mark.parametrize("kind", ["llama", "gpt2", "qwen2"])
def test_a_language_model_is_the_dense_merge(
    causal_families: Any, causal_twins: Any, tmp_path: Path, kind: str
) -> None:
    lines = export_twin(causal_twins(kind), tmp_path / "out", to="hf", weights=["0.2,0.9,-0.3"])
    assert "mmlu 0.2, bbq 0.9, cnn_dailymail -0.3" in lines[0]
    loaded, report = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    inputs = batch(4)
    twin: Any = TwinModel.from_pretrained(causal_twins(kind))
    with torch.no_grad():
        found = loaded(**inputs).logits
        fused = twin(**inputs, fusion_weights=WEIGHTS.repeat(4, 1)).logits
        expected = dense(causal_families(kind), WEIGHTS)(**inputs).logits
    kept = inputs["attention_mask"].bool()
    torch.testing.assert_close(found[kept].double(), expected[kept], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found[kept], fused[kept], rtol=1e-4, atol=1e-5)
    assert transformers.AutoTokenizer.from_pretrained(tmp_path / "out").pad_token == "[PAD]"


@pytest.mark.parametrize("kind", ["bert", "gpt2"])
def test_a_classifier_has_its_expert_s_head(twins: Any, tmp_path: Path, kind: str) -> None:
    assert main(["export", str(twins(kind)), str(tmp_path / "mnli"), "--format", "hf", "--expert", "mnli"]) == 0
    twin: Any = TwinModel.from_pretrained(twins(kind))
    loaded, report = transformers.AutoModelForSequenceClassification.from_pretrained(
        tmp_path / "mnli", output_loading_info=True
    )
    assert not report["missing_keys"]
    assert loaded.config.num_labels == 3
    inputs = batch(4)
    with torch.no_grad():
        expected = twin(**inputs, fusion_weights=torch.tensor([[0.0, 0, 1]]).repeat(4, 1), task="mnli").logits
        torch.testing.assert_close(loaded(**inputs).logits, expected, rtol=1e-4, atol=1e-5)
    card = (tmp_path / "mnli" / "README.md").read_text()
    assert "The head is that of the expert `mnli`." in card
    assert "| mnli | 0 | 0 | 1 |" in card
    assert str(tmp_path) not in card


def test_a_classifier_s_mixture_is_a_backbone_or_has_the_head_that_is_named(twins: Any, tmp_path: Path) -> None:
    export_twin(twins("bert"), tmp_path / "backbone", to="hf", weights=["0.2,0.9,-0.3"])
    assert json.loads((tmp_path / "backbone" / "config.json").read_text())["architectures"] == ["BertModel"]
    export_twin(twins("bert"), tmp_path / "headed", to="hf", weights=["0.2,0.9,-0.3"], head="stsb")
    headed = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "headed")
    backbone, report = transformers.AutoModel.from_pretrained(tmp_path / "backbone", output_loading_info=True)
    assert not report["missing_keys"]
    twin: Any = TwinModel.from_pretrained(twins("bert"))
    inputs = batch(4)
    with torch.no_grad():
        expected = twin(**inputs, fusion_weights=WEIGHTS.repeat(4, 1), task="stsb").logits
        torch.testing.assert_close(headed(**inputs).logits, expected, rtol=1e-4, atol=1e-5)
        states = headed.bert(**inputs).last_hidden_state
        torch.testing.assert_close(backbone(**inputs).last_hidden_state, states, rtol=0, atol=0)


@pytest.mark.parametrize("exclusive", [{"kind": "magnitude", "density": 0.3}, {"rank": 4, "bits": 4}])
def test_other_kinds_of_exclusive_vectors_are_fused(
    causal_families: Any, tmp_path: Path, exclusive: dict[str, Any]
) -> None:
    recipe = {**causal_families("qwen2").recipe, "exclusive": exclusive, "router": None}
    twin: Any = TwinModel.from_pretrained(built(recipe, tmp_path / "twin"))
    export_twin(tmp_path / "twin", tmp_path / "out", to="hf", weights=["0.2,0.9,-0.3"])
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    inputs = {"input_ids": batch(4)["input_ids"]}
    with torch.no_grad():
        expected = twin(**inputs, fusion_weights=WEIGHTS.repeat(4, 1)).logits
        torch.testing.assert_close(loaded(**inputs).logits, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["bart", "flan-t5"])
def test_an_encoder_decoder_keeps_its_tied_and_untied_tables(seq2seq_twins: Any, tmp_path: Path, kind: str) -> None:
    export_twin(seq2seq_twins(kind), tmp_path / "out", to="hf", weights=["0.2,0.9,-0.3"])
    loaded = transformers.AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "out")
    twin: Any = TwinModel.from_pretrained(seq2seq_twins(kind))
    inputs = {"input_ids": batch(2)["input_ids"][:1], "decoder_input_ids": torch.tensor([[0, 5, 9]])}
    with torch.no_grad():
        expected = twin(**inputs, fusion_weights=WEIGHTS[None]).logits
        torch.testing.assert_close(loaded(**inputs).logits, expected, rtol=1e-4, atol=1e-4)

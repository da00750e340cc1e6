"""DeBERTa's relative positions, which all rows of a batch share: rows of other weights never share a batch there."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from torch.func import functional_call

from tests.support.models import tiny_tokenizer
from twin_bench.checkpoints.factors import Factors
from twin_bench.twin.classifier import TwinClassifier
from twin_bench.twin.exclusive import Exclusive
from twin_bench.twin.parts import Parts

SHAPE: dict[str, Any] = {
    "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24, "vocab_size": 60,
    "relative_attention": True, "pos_att_type": ["p2c", "c2p"], "max_relative_positions": 8, "num_labels": 2,
    "pad_token_id": 0, "type_vocab_size": 0,
}  # fmt: skip
CONFIGS = {
    "v1": transformers.DebertaConfig(**SHAPE),
    "v2": transformers.DebertaV2Config(**SHAPE, norm_rel_ebd="layer_norm"),
    "v2 with shared keys": transformers.DebertaV2Config(**SHAPE, share_att_key=True, position_buckets=8),
}
ATTENTION = "deberta.encoder.layer.0.attention.self"
CASES = {
    "v1's products of positions": ("v1", [f"{ATTENTION}.pos_proj.weight", f"{ATTENTION}.pos_q_proj.bias"]),
    "v2's norm of positions": ("v2", ["deberta.encoder.LayerNorm.weight", "deberta.encoder.LayerNorm.bias"]),
    "v2's keys of positions": ("v2", [f"{ATTENTION}.pos_key_proj.weight"]),
    "v2's queries of positions": ("v2", [f"{ATTENTION}.pos_query_proj.weight"]),
    "v2's shared keys": ("v2 with shared keys", [f"{ATTENTION}.query_proj.weight", f"{ATTENTION}.key_proj.bias"]),
}
TEXTS = [("w1 w2 w3", None), ("w4 w5", None), ("w6 w7 w8 w9", None), ("w2 w2", None)]


def made(kind: str, places: list[str]) -> tuple[TwinClassifier, Any, list[dict[str, Tensor]]]:
    """Return a twin of two experts that change some parameters, its plain model, and what each expert adds."""
    torch.manual_seed(0)
    model = transformers.AutoModelForSequenceClassification.from_config(CONFIGS[kind]).double().eval()
    names = dict(model.named_parameters())
    exclusive: dict[str, Exclusive] = {}
    added: list[dict[str, Tensor]] = []
    for expert in ("cola", "sst2"):
        factors = {
            name: Factors(torch.randn(len(names[name]), 2).double(), torch.randn(2, names[name].shape[1]).double())
            for name in places
            if names[name].ndim == 2
        }
        vectors = {name: torch.randn_like(names[name]) for name in places if names[name].ndim == 1}
        exclusive[expert] = Exclusive(factors, vectors)
        added.append({**{name: pair.B @ pair.A for name, pair in factors.items()}, **vectors})
    head = {name: tensor.detach() for name, tensor in names.items() if not name.startswith("deberta.")}
    parts = Parts(heads=dict.fromkeys(exclusive, head), exclusive=exclusive)
    return TwinClassifier(copy.deepcopy(model), tiny_tokenizer("distilbert"), parts), model, added


@pytest.mark.parametrize("copies", [True, False], ids=["fused", "one by one"])
@pytest.mark.parametrize("case", list(CASES))
@torch.no_grad()
def test_rows_of_any_weights_are_answered_as_dense_merges_are(case: str, copies: bool) -> None:
    """A norm of the positions was given as many rows' weights as the table could be cut for, without a word."""
    twin, model, added = made(*CASES[case])
    twin.fusion.keeps_copies = copies
    weights = torch.tensor([[0.25, 0.75], [0.6, 0.4], [0.0, 0.0], [0.6, 0.4]]).double()
    encoded = twin.encode(TEXTS)
    found = [one.logits for one in twin.answer(encoded, ["cola"] * 4, batch_size=4, fusion_weights=weights)]
    inputs = twin.collate(encoded)
    at_once = twin(**inputs, fusion_weights=weights, task="cola").logits
    base = dict(model.named_parameters())
    for row, own in enumerate(weights):
        merged = {
            name: base[name] + sum(w * vector[name] for w, vector in zip(own, added, strict=True)) for name in added[0]
        }
        alone = {name: tensor[row : row + 1] for name, tensor in inputs.items()}
        expected = functional_call(model, merged, (), alone).logits[0]
        torch.testing.assert_close(at_once[row], expected, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(found[row].double(), expected, rtol=1e-5, atol=1e-5)


def test_other_layers_of_deberta_are_mixed() -> None:
    twin, _, _ = made("v1", [f"{ATTENTION}.in_proj.weight", "deberta.encoder.layer.0.output.dense.weight"])
    assert twin.costs.mixes
    for kind, places in CASES.values():
        assert not any(made(kind, [place])[0].costs.mixes for place in places)

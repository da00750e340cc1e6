"""Encoder-decoders' twins against a dense model made for every sample, and against transformers and peft alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.support.dense import dense, mixes
from tests.support.models import CAUSAL_VOCABULARY as VOCABULARY
from twin_bench import TwinModel
from twin_bench.twin.seq2seq import TwinSeq2Seq

pytestmark = pytest.mark.versions

KINDS = ["t5", "flan-t5", "mt5", "bart"]


def sources(rows: int, seed: int = 0, pad: str = "right") -> dict[str, Tensor]:
    """Return token ids of lengths 9, 8, 7, 6, 9, ..., padded on one side."""
    ids = torch.randint(4, VOCABULARY, (rows, 9), generator=torch.Generator().manual_seed(seed))
    mask = torch.ones_like(ids)
    for row in range(rows):
        gap = row % 4
        mask[row, : gap if pad == "left" else 0] = 0
        mask[row, 9 - gap if pad == "right" else 9 :] = 0
    return {"input_ids": ids * mask, "attention_mask": mask}


def targets(rows: int) -> Tensor:
    return torch.randint(4, VOCABULARY, (rows, 7), generator=torch.Generator().manual_seed(9))


def unpadded(batch: dict[str, Tensor], row: int) -> Tensor:
    return batch["input_ids"][row][batch["attention_mask"][row].bool()][None]


def force_path(twin: TwinModel, path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    costs, free = twin.fusion.costs(), {"fused": 0.0, "low-rank": 1e12}[path]
    forced = type(costs)(tuple(free for _ in costs.fuse), free, tuple(1.0 for _ in costs.fuse), 1.0)
    monkeypatch.setattr(type(twin.fusion), "costs", lambda self: forced)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("mix", ["one_hot", "any real number", "mixed", "equal"])
@pytest.mark.parametrize("path", ["fused", "low-rank"])
def test_logits_equal_the_dense_fusion_of_every_sample(
    seq2seq_families: Any, seq2seq_twins: Any, kind: str, mix: str, path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    twin = TwinModel.from_pretrained(seq2seq_twins(kind))
    force_path(twin, path, monkeypatch)
    weights, target = mixes(4, 3)[mix], targets(4)
    for pad in ("right", "left"):
        batch = sources(4, pad=pad)
        found = twin(**batch, labels=target, fusion_weights=weights).logits
        for row in range(4):
            with torch.no_grad():
                reference = dense(seq2seq_families(kind), weights[row])
                expected = reference(input_ids=unpadded(batch, row), labels=target[row : row + 1]).logits[0]
            assert (found[row].double() - expected).norm() <= 1e-5 * expected.norm()


def test_an_untied_output_layer_is_fused_by_itself(seq2seq_families: Any, seq2seq_twins: Any) -> None:
    twin = TwinModel.from_pretrained(seq2seq_twins("flan-t5"))
    assert isinstance(twin, TwinSeq2Seq)
    twin.model.tie_weights()  # as lm-eval does once it has loaded a model
    weight = twin.model.lm_head.weight
    shared = dense(seq2seq_families("flan-t5"), torch.zeros(3)).lm_head.weight
    torch.testing.assert_close(weight.double(), shared, rtol=1e-5, atol=1e-6)
    assert not torch.equal(weight, twin.model.shared.weight)

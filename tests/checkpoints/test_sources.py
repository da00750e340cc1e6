"""A model made of its parameters is what transformers itself loads, in every dtype."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers

from tests.support.models import CAUSAL_VOCABULARY as VOCABULARY
from twin_bench.checkpoints.sources import load_model, open_sources

pytestmark = pytest.mark.versions


@pytest.mark.parametrize(
    ("kind", "dtype"), [("llama", "bfloat16"), ("gemma", "float16"), ("t5", "float16"), ("bart", "bfloat16")]
)
def test_in_half_precision_only_weights_are_rounded(
    causal_families: Any, seq2seq_families: Any, kind: str, dtype: str
) -> None:
    """Rotary frequencies are not: positions far from the beginning would be others. Nor are T5's layers of float32."""
    causal = kind in ("llama", "gemma")
    recipe = (causal_families if causal else seq2seq_families)(kind).recipe
    auto = transformers.AutoModelForCausalLM if causal else transformers.AutoModelForSeq2SeqLM
    sources = open_sources(recipe["base_model"], recipe["experts"])
    ids = torch.randint(4, VOCABULARY, (2, 60), generator=torch.Generator().manual_seed(0))
    given = {"input_ids": ids, **({} if causal else {"labels": ids})}
    expected = auto.from_pretrained(recipe["base_model"], dtype=dtype)
    with torch.no_grad():
        found = load_model(sources, dict(sources.base.items()), dtype)(**given).logits
        assert torch.equal(found, expected(**given).logits)

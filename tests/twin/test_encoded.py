"""Encoded rows that differ in their mask alone, or in where their ids end."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch

from twin_bench import TwinModel
from twin_bench.twin.encoded import identity

Row = Mapping[str, list[int]]
WHOLE = [1] * 6
PAIRS: list[tuple[Row, Row]] = [
    (
        {"input_ids": [2, 5, 6, 3, 7, 0], "attention_mask": [1, 1, 1, 1, 0, 0]},
        {"input_ids": [2, 5, 6, 3, 7, 0], "attention_mask": WHOLE},
    ),
    ({"input_ids": [2, 5, 6, 0, 0, 0]}, {"input_ids": [2, 5, 6], "token_type_ids": [0, 0, 0]}),
    (
        {"input_ids": [2, 5, 6, 3, 9, 8, 7]},
        {"input_ids": [2, 5, 6, 3, 9, 8], "token_type_ids": [0, 1, 1, 1, 1, 1]},
    ),
    (
        {"input_ids": [2, 5, 6, 3], "token_type_ids": [0, 0, 1, 1]},
        {"input_ids": [2, 5, 6, 3], "attention_mask": [0, 0, 1, 1]},
    ),
]


@pytest.mark.parametrize("pair", PAIRS, ids=range(len(PAIRS)))
@pytest.mark.parametrize("routed", [False, True])
def test_different_inputs_have_their_own_answers(twins: Any, pair: tuple[Row, Row], routed: bool) -> None:
    twin: Any = TwinModel.from_pretrained(twins("bert"))
    weights = None if routed else torch.full((2, 3), 1 / 3)
    alone = [
        twin.answer([row], "cola", fusion_weights=None if weights is None else weights[:1])[0].logits for row in pair
    ]
    assert not torch.allclose(*alone, atol=1e-3)
    together = [answer.logits for answer in twin.answer(pair, "cola", fusion_weights=weights)]
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-4)
    if routed:
        each = torch.cat([twin.route_all([row]) for row in pair])
        torch.testing.assert_close(twin.route_all(pair), each, atol=1e-5, rtol=1e-4)


def test_a_mask_that_leaves_out_nothing_tells_no_rows_apart() -> None:
    assert identity({"input_ids": [5, 6]}) == identity({"input_ids": [5, 6], "attention_mask": [1, 1]})
    assert identity({"input_ids": [5, 6]}) < identity({"input_ids": [5, 7]}) < identity({"input_ids": [6, 2]})
    assert len(identity({"input_ids": [5] * 100, "attention_mask": [1] * 100})) == 404

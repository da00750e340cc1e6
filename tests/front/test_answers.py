"""Completions of groups of prompts become one, or it is said what is wrong with them."""

from __future__ import annotations

import json
from typing import Any

import pytest

from twin_bench.front.answers import MalformedError, joined


def answer(*indices: Any) -> bytes:
    return json.dumps({"id": "x", "choices": [{"index": one, "text": str(one)} for one in indices]}).encode()


def test_choices_come_back_in_the_order_of_the_prompts() -> None:
    found = joined([([0, 2], answer(3, 0, 2, 1)), ([1], answer(0, 1))], 2, "twin")
    assert [(choice["index"], choice["text"]) for choice in found["choices"]] == [
        *((0, "0"), (1, "1")),
        *((2, "0"), (3, "1")),
        *((4, "2"), (5, "3")),
    ]


@pytest.mark.parametrize("wrong", [(), (0,), (0, 0), (0, -1), (1, 2), (0, 1, 2), (0, "1"), (0, None), (0, 1.0)])
def test_every_choice_must_be_there_once(wrong: tuple[Any, ...]) -> None:
    with pytest.raises(MalformedError):
        joined([([0], answer(0, 1)), ([1], answer(*wrong))], 2, "twin")

"""The bodies of requests are read strictly, and written so that any server can read them."""

from __future__ import annotations

import json
from typing import Any

import pytest

from twin_bench.errors import InputError
from twin_bench.front.requests import choices_each, encoded, read_body


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e999"])
def test_numbers_that_are_not_finite_are_refused(number: str) -> None:
    with pytest.raises(InputError, match=f"'{number}' is no finite number"):
        read_body(f'{{"logit_bias": {{"3": {number}}}}}'.encode())


def test_what_is_read_is_written_again() -> None:
    body = {"a": 1e-3, "b": [1.5, 10**400, None, True], "c": "é \ud800 \U0001f600", "d": {"": {}}}
    assert read_body(json.dumps(body).encode()) == body
    assert read_body(json.dumps(body, ensure_ascii=False).encode(errors="replace"))["b"] == body["b"]
    assert read_body(encoded(body)) == body


def test_a_body_that_can_be_read_and_not_be_written_is_refused() -> None:
    """The limit of Python's stack may come between the two."""
    deep: Any = []
    for _ in range(100_000):
        deep = [deep]
    with pytest.raises(InputError, match="nested too deeply"):
        encoded({"a": deep})


@pytest.mark.parametrize("n", ["2", 2.0, -1, 0, True, [1]])
def test_a_number_of_choices_is_a_whole_number(n: Any) -> None:
    with pytest.raises(InputError, match="n: expected a whole number of at least 1"):
        choices_each({"n": n})
    assert [choices_each(body) for body in ({}, {"n": None}, {"n": 3})] == [1, 1, 3]

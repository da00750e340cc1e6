"""Mutations of what a user writes, and how each must end: well, or in one line that can be printed."""

from __future__ import annotations

import copy
import datetime
from collections.abc import Callable, Iterator
from typing import Any

from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st

from twin_bench.errors import LONGEST, InputError

ODD: list[Any] = [
    *(
        None,
        True,
        False,
        "",
        " ",
        "auto",
        "ties",
        "none",
        "a",
        "1",
        "nan",
        "../x",
        "/",
        "~",
        "$HOME",
        "${NOPE}",
        "a\nb",
    ),
    *(0, 1, -1, 2, 7, 2**31, 2**63, 2**64, -(2**63), 10**400, 0.0, -0.5, 0.5, 1.5, 1e-308, 1e308),
    *(float("nan"), float("inf"), float("-inf")),
    *("\x1b[31mred", "\u202e\u200b", "\ud83d", "\U0001f600", "é" * 300, "x" * 10_000, "\x00", "%s{}", "'\""),
    *([], {}, [[]], [None], [1, 2], ["a", 1], {"a": 1}, {"method": "ties"}, {1: 2}, [[[[[["deep"]]]]]]),
    *(b"bytes", datetime.date(2020, 1, 1)),
]
"""Values of every kind that YAML, JSON or a caller can bring."""

PIECES = ["", "<<", "*a", "&a", "!!int", *""":-[]{}&*!#|>'",?~9\\\t\x00\x1b\ud83dé """]
"""What YAML and JSON are written with."""


def cases(number: int) -> Any:
    """Return the settings of a test of `number` cases, which are the same ones each time."""
    return settings(
        max_examples=number,
        derandomize=True,
        database=None,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture, HealthCheck.data_too_large],
    )


def places(value: Any, place: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Yield the place of every value inside nested data, itself first: the keys and indices that lead to it."""
    yield place
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in inner:
        yield from places(item, (*place, key))


@st.composite
def mutated(draw: st.DrawFn, valid: Any, values: list[Any] = ODD) -> Any:
    """Return nested data with one to three mutations: values and keys that are changed, taken out, added or moved."""
    data = copy.deepcopy(draw(st.sampled_from(valid)) if isinstance(valid, list) else valid)
    for _ in range(draw(st.integers(1, 3))):
        where = [place for place in places(data) if place]
        if not where:
            return data
        *above, last = draw(st.sampled_from(where))
        holder = data
        for part in above:
            holder = holder[part]
        value = holder[last]
        kind = draw(st.sampled_from(("set", "set", "set", "set", "drop", "name", "add", "wrap", "text", "swap")))
        if kind == "set":
            holder[last] = copy.deepcopy(draw(st.sampled_from(values)))
        elif kind == "drop":
            del holder[last]
        elif kind == "name" and isinstance(holder, dict):
            holder[draw(st.sampled_from(["", "x", f"{last}s", 3, None, "\x1b[0m", "method", "a/b"]))] = holder.pop(last)
        elif kind == "add" and isinstance(value, dict | list):
            new = copy.deepcopy(draw(st.sampled_from(values)))
            if isinstance(value, dict):
                value[draw(st.sampled_from(["more", "seed", "\u202e", 1.5]))] = new
            else:
                value.append(new)
        elif kind == "wrap":
            holder[last] = draw(st.sampled_from([[value], {"a": value}, [value, value]]))
        elif kind == "text":
            holder[last] = str(value)
        else:
            other = data
            for part in draw(st.sampled_from(where)):
                other = other[part] if isinstance(other, dict | list) else other
            holder[last] = copy.deepcopy(other)
    return data


@st.composite
def scribbled(draw: st.DrawFn, text: str) -> str:
    """Return a text in which a few characters or lines are changed, taken out or repeated."""
    for _ in range(draw(st.integers(1, 4))):
        lines = text.split("\n")
        row = draw(st.integers(0, len(lines) - 1))
        if draw(st.booleans()):
            column = draw(st.integers(0, len(lines[row])))
            piece = draw(st.sampled_from(PIECES))
            lines[row] = lines[row][:column] + piece + lines[row][column + draw(st.integers(0, 2)) :]
        elif draw(st.booleans()):
            lines.insert(draw(st.integers(0, len(lines))), lines[row])
        else:
            del lines[row]
        text = "\n".join(lines)
    return text


def ends_well(run: Callable[[], Any], *others: type[Exception]) -> None:
    """Run. It may succeed, or end in an InputError, or in one of `others` that says what an argument must be."""
    try:
        run()
    except InputError as error:
        said = str(error)
    except others as error:
        said = str(error)
        assert " must be " in said, said
    else:
        return
    assert said
    assert len(said) <= LONGEST
    assert said.isprintable(), repr(said)

"""The bodies of requests in the form of OpenAI's API: reading, checking and writing them."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

from twin_bench.errors import InputError, first_line, shown
from twin_bench.twin.arguments import whole

OWN_OF_THE_MODEL = {"chat_template", "tokenizer_kwargs"}
"""Options of a chat template that a request may not give: a template is a program."""


def read_body(content: bytes) -> dict[str, Any]:
    """Return the JSON object in a request's body. InputError where there is none, or a number is not finite."""
    try:
        body = json.loads(content, parse_constant=_finite, parse_float=_finite)
    except ValueError as error:
        raise InputError(f"the body is not JSON ({first_line(error)})") from None
    except RecursionError:
        raise _too_deep() from None
    if not isinstance(body, dict):
        raise InputError("the body is no JSON object")
    return body


def encoded(body: Mapping[str, Any]) -> bytes:
    """Return the JSON of a body that was read. It is ASCII: a text may hold a half of a surrogate pair."""
    try:
        return json.dumps(body, allow_nan=False).encode("ascii")
    except RecursionError:
        raise _too_deep() from None


def template_options(body: Mapping[str, Any]) -> dict[str, Any]:
    """Return a chat request's options of the template. InputError where it brings a template of its own."""
    options = body.get("chat_template_kwargs") or {}
    if not isinstance(options, dict):
        raise InputError(f"chat_template_kwargs: expected an object, not {shown(options)}")
    if body.get("chat_template") or options.keys() & OWN_OF_THE_MODEL:
        raise InputError("chat_template: the template is the model's own; leave it out")
    return options


def choices_each(body: Mapping[str, Any]) -> int:
    """Return how many choices a request asks for of each prompt, `n`. InputError for what is no such number."""
    asked = body.get("n")
    count = 1 if asked is None else whole(asked)
    if count is None or count < 1:
        raise InputError(f"n: expected a whole number of at least 1, not {shown(asked)}")
    return count


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"{shown(text)} is no finite number")
    return number


def _too_deep() -> InputError:
    return InputError("the body is nested too deeply; send fewer brackets inside each other")

"""The bodies of answers in the form of OpenAI's API: errors, the list of models, and completions put together."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from twin_bench.errors import first_line, shown
from twin_bench.front.requests import read_body


class MalformedError(ValueError):
    """An answer of the server that is no completion."""


def error_body(message: str, kind: str, status: int) -> dict[str, Any]:
    """Return the body of an error."""
    return {"error": {"message": message, "type": kind, "param": None, "code": status}}


def model_list(names: Sequence[str]) -> dict[str, Any]:
    """Return the body of the answer to GET /v1/models."""
    return {"object": "list", "data": [{"id": name, "object": "model", "owned_by": "twin-bench"} for name in names]}


def joined(parts: Sequence[tuple[Sequence[int], bytes]], choices_each: int, model: str) -> dict[str, Any]:
    """Return one completion of several prompts, from the completions of groups of them.

    Args:
        parts: for each group the places of its prompts in the request, and the body of the server's answer to them.
        choices_each: the number of choices for each prompt (`n`).
        model: the name that the completion says.

    Raises:
        MalformedError: an answer is no completion of its group's prompts.
    """
    choices: list[dict[str, Any]] = []
    usage: dict[str, int] = {}
    first: dict[str, Any] = {}
    for places, content in parts:
        try:
            answer = read_body(content)
            found = sorted(choice["index"] for choice in answer["choices"])
            if found != list(range(len(places) * choices_each)):
                raise ValueError(f"{len(places)} prompts with {choices_each} choices each, not of index {shown(found)}")
            for choice in answer["choices"]:
                prompt, number = divmod(choice["index"], choices_each)
                choices.append({**choice, "index": places[prompt] * choices_each + number})
            for key, value in (answer.get("usage") or {}).items():
                if isinstance(value, int):
                    usage[key] = usage.get(key, 0) + value
        except (ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
            raise MalformedError(f"{type(error).__name__}: {first_line(error)}") from None
        first = first or answer
    return {**first, "model": model, "choices": sorted(choices, key=lambda one: one["index"]), "usage": usage}

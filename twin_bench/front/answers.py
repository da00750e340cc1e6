"""The bodies of answers in the form of OpenAI's API: errors, the list of models, and completions put together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any


def error_body(message: str, kind: str, status: int) -> dict[str, Any]:
    """Return the body of an error."""
    return {"error": {"message": message, "type": kind, "param": None, "code": status}}


def model_list(names: Sequence[str]) -> dict[str, Any]:
    """Return the body of the answer to GET /v1/models."""
    return {"object": "list", "data": [{"id": name, "object": "model", "owned_by": "twin-bench"} for name in names]}


def joined(parts: Sequence[tuple[Sequence[int], Mapping[str, Any]]], choices_each: int, model: str) -> dict[str, Any]:
    """Return one completion of several prompts, from the completions of groups of them.

    Args:
        parts: for each group the places of its prompts in the request, and the server's answer to them.
        choices_each: the number of choices for each prompt (`n`).
        model: the name that the completion says.
    """
    choices: list[dict[str, Any]] = []
    usage: dict[str, int] = {}
    for places, answer in parts:
        for choice in answer["choices"]:
            prompt, number = divmod(choice["index"], choices_each)
            choices.append({**choice, "index": places[prompt] * choices_each + number})
        for key, value in (answer.get("usage") or {}).items():
            if isinstance(value, int):
                usage[key] = usage.get(key, 0) + value
    first = dict(parts[0][1])
    return {**first, "model": model, "choices": sorted(choices, key=lambda one: one["index"]), "usage": usage}

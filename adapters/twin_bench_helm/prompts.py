"""From HELM's text to a model's tokens. Imports no HELM."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from twin_bench.errors import InputError, first_line
from twin_bench_helm.errors import RefusedError

PROBES = ("a", "1.", "A b\n")
"""Texts of which the tokens that a chat template adds are counted."""

Message = Mapping[str, str]


def in_template(tokenizer: Any, messages: Sequence[Message]) -> str:
    """Return a conversation in the tokenizer's chat template, up to where the assistant answers.

    Raises:
        InputError: the tokenizer has no chat template.
        RefusedError: the template does not take these messages.
    """
    if not tokenizer.chat_template:
        raise InputError("the tokenizer has no chat template; leave out --chat-template (apply_chat_template: false)")
    try:
        text: str = tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=True)
    except Exception as error:  # a template is the model's own program, which raises what it likes
        raise RefusedError(f"the chat template does not take these messages ({first_line(error)})") from None
    return text


def encoded(tokenizer: Any, text: str, *, templated: bool) -> list[int]:
    """Return a prompt's tokens. A template writes the special tokens itself, so a `templated` text gets no others.

    RefusedError for a text that no tokenizer takes, because UTF-8 can't write it.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise RefusedError(
            f"character {error.start} of the prompt is half of a surrogate pair; read its file as UTF-8"
        ) from None
    ids: list[int] = tokenizer(text, add_special_tokens=not templated)["input_ids"]
    return ids


def surrounding_tokens(tokenizer: Any, *, templated: bool) -> int:
    """Return how many tokens a prompt has beside those of its text, which are all that HELM counts.

    They are the special tokens that the tokenizer adds, or those of the chat template around a user's turn. Where text
    and template meet, tokens may join, so the largest number of several texts is taken.
    """
    if not templated:
        return len(encoded(tokenizer, "", templated=False))
    return max(
        len(encoded(tokenizer, in_template(tokenizer, [{"role": "user", "content": text}]), templated=True))
        - len(tokenizer(text, add_special_tokens=False)["input_ids"])
        for text in PROBES
    )

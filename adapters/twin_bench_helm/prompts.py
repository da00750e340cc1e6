"""The chat template as HELM's deployments ask for it, and the room that it takes. Imports no HELM."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from twin_bench.errors import InputError
from twin_bench.serving import prompts
from twin_bench.serving.prompts import Message, encoded

PROBES = ("a", "1.", "A b\n")
"""Texts of which the tokens that a chat template adds are counted."""


def in_template(tokenizer: Any, messages: Sequence[Message]) -> str:
    """Return a conversation in the tokenizer's chat template, up to where the assistant answers.

    Raises:
        InputError: the tokenizer has no chat template.
        RefusedError: the template does not take these messages.
    """
    if not tokenizer.chat_template:
        raise InputError("the tokenizer has no chat template; leave out --chat-template (apply_chat_template: false)")
    return prompts.in_template(tokenizer, messages)


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

"""From a harness's texts and conversations to a model's tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from twin_bench.errors import RefusedError, first_line

Message = Mapping[str, str]


def in_template(tokenizer: Any, messages: Sequence[Message]) -> str:
    """Return a conversation in the tokenizer's chat template, up to where the assistant answers.

    RefusedError where the template does not take these messages. The tokenizer has a template.
    """
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

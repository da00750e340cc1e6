"""Prompts in the chat template: their tokens against transformers' own, and the room they leave."""

from __future__ import annotations

import dataclasses
import random
from pathlib import Path
from typing import Any

import pytest
from helm.common.cache import BlackHoleCacheConfig
from helm.common.request import Request
from tokenizers import processors

from tests.support.models import WORDS
from twin_bench import InputError
from twin_bench.serving.prompts import encoded
from twin_bench_helm.client import TwinClient
from twin_bench_helm.prompts import in_template, surrounding_tokens

pytestmark = pytest.mark.versions

TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'alien' %}{{ raise_exception('no aliens') }}{% endif %}"
    "<{{ m.role }}>\n{{ m.content | trim }}{{ eos_token }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>\n{% endif %}"
)
REQUEST = Request(model="twin_merged/t", model_deployment="twin_merged/t", temperature=0.0, max_tokens=4)


@pytest.fixture
def chat(three: Path, monkeypatch: pytest.MonkeyPatch) -> TwinClient:
    """Return a client of a twin whose tokenizer has a chat template, and begins every text with its bos token."""
    ours = TwinClient(BlackHoleCacheConfig(), str(three), device="cpu", apply_chat_template=True)
    tokenizer = ours.engine.twin.tokenizer
    backend, before = tokenizer.backend_tokenizer, tokenizer.backend_tokenizer.post_processor
    monkeypatch.setattr(tokenizer, "chat_template", TEMPLATE)
    backend.post_processor = processors.TemplateProcessing(single="[CLS] $A", special_tokens=[("[CLS]", 2)])
    yield ours
    backend.post_processor = before


def test_a_prompt_is_a_users_turn_as_transformers_writes_it(chat: TwinClient, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = chat.engine.twin.tokenizer
    messages = [{"role": "user", "content": "the cat sat"}]
    options = {"tokenize": True, "add_generation_prompt": True, "return_dict": True}
    expected = tokenizer.apply_chat_template(messages, **options)["input_ids"]
    assert expected.count(tokenizer.bos_token_id) == 1
    read: list[Any] = []
    answer = chat.engine.answer
    monkeypatch.setattr(chat.engine, "answer", lambda asked, *rest: read.extend(asked) or answer(asked, *rest))
    by_turn = chat.make_request(dataclasses.replace(REQUEST, prompt="the cat sat"))
    by_messages = chat.make_request(dataclasses.replace(REQUEST, messages=messages))
    assert [list(ask.prompt) for ask in read] == [expected] * 2
    assert by_turn.completions == by_messages.completions
    assert encoded(tokenizer, "the cat", templated=False)[0] == tokenizer.bos_token_id


def test_the_window_leaves_room_for_the_template(chat: TwinClient) -> None:
    tokenizer = chat.engine.twin.tokenizer
    around = surrounding_tokens(tokenizer, templated=True)
    draw = random.Random(0)
    assert surrounding_tokens(tokenizer, templated=False) == 1
    for _ in range(20):
        text = " ".join(draw.choices(WORDS, k=draw.randint(1, 9))) + draw.choice(["", "\n", " ", "?"])
        own = len(tokenizer(text, add_special_tokens=False)["input_ids"])
        whole = encoded(tokenizer, in_template(tokenizer, [{"role": "user", "content": text}]), templated=True)
        assert around - 2 <= len(whole) - own <= around


def test_messages_that_the_template_refuses_are_set_aside(chat: TwinClient) -> None:
    result = chat.make_request(dataclasses.replace(REQUEST, messages=[{"role": "alien", "content": "x"}]))
    assert result.error == "the chat template does not take these messages (no aliens)"
    assert (result.error_flags.is_retriable, result.error_flags.is_fatal) == (False, False)


def test_no_chat_template_is_fatal(three: Path) -> None:
    ours = TwinClient(BlackHoleCacheConfig(), str(three), device="cpu", apply_chat_template=True)
    result = ours.make_request(dataclasses.replace(REQUEST, prompt="the cat"))
    assert "no chat template" in result.error
    assert result.error_flags.is_fatal
    with pytest.raises(InputError, match="no chat template"):
        surrounding_tokens(ours.engine.twin.tokenizer, templated=True)

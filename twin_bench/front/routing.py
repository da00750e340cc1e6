"""Which adapter answers a prompt: the one whose fusion weights are nearest to the router's."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoTokenizer

from twin_bench.checkpoints.skeleton import AUTO_MODEL, quiet_transformers
from twin_bench.errors import InputError, first_line, shown
from twin_bench.export.served import SHARED, Served, read_served
from twin_bench.front.requests import template_options
from twin_bench.twin.arguments import require_ids, vocabulary_size
from twin_bench.twin.causal import TwinCausalLM
from twin_bench.twin.device import usable_device
from twin_bench.twin.encoded import tokens
from twin_bench.twin.exclusive import Exclusive
from twin_bench.twin.parts import Parts
from twin_bench.twin.routers.store import load_router


def nearest_adapter(weights: Tensor, served: Served) -> str:
    """Return the name of the adapter whose fusion weights have the smallest distance to `weights` (experts,).

    It is the expert with the largest weight, where experts alone are adapters. Of adapters at one distance the first is
    taken. Weights that are all 0, of a router that is not sure enough, are the shared expert's.
    """
    if not weights.any():
        return SHARED
    known = torch.tensor(list(served.adapters.values()), dtype=torch.float64)
    return list(served.adapters)[int((known - weights.double()).square().sum(dim=1).argmin())]


class PromptRouter:
    """The router of an export, and the shared expert whose hidden states it reads.

    A prompt is tokenised as vLLM does it. The router reads its last `max_length` tokens, as it does in a harness.
    Several threads may ask; one after the other is answered.
    """

    def __init__(self, twin: TwinCausalLM, served: Served) -> None:
        self.served = served
        self.tokenizer = twin.tokenizer
        self._twin = twin
        self._lock = threading.Lock()

    @classmethod
    def open(cls, directory: Path, *, device: str = "cpu") -> PromptRouter:
        """Open an export of the format vllm. InputError where it is none, or has no router."""
        served, router = read_served(directory), load_router(directory / "router")
        if router is None:
            raise InputError(f"{directory}: no router there; export a twin that was built with one")
        if tuple(router.config.experts) != served.experts:
            raise InputError(f"{directory}: router/ is of other experts than serving.json; export the twin again")
        with quiet_transformers():
            model = AUTO_MODEL["causal_lm"].from_pretrained(directory / "model", dtype="auto")
        tokenizer = AutoTokenizer.from_pretrained(directory / "model")
        nothing = {name: Exclusive({}, {}) for name in served.experts}  # the router reads the shared expert alone
        parts = Parts(exclusive=nothing, router=router, max_length=served.max_length)
        return cls(TwinCausalLM(model, tokenizer, parts, tolerance=0).to(usable_device(device)), served)

    def completion_prompts(self, body: Mapping[str, Any]) -> list[list[int]]:
        """Return the token ids of each prompt of a completions request. InputError for what is no prompt."""
        prompt: Any = body.get("prompt")
        several = isinstance(prompt, list) and prompt and isinstance(prompt[0], str | list)
        prompts: list[Any] = prompt if several else [prompt]
        return [self._ids(one, body.get("add_special_tokens", True)) for one in prompts]

    def chat_prompt(self, body: Mapping[str, Any]) -> list[int]:
        """Return the token ids of a chat request's messages. InputError for messages that the template can't take."""
        messages = body.get("messages")
        if not isinstance(messages, list) or not messages:
            raise InputError("messages: expected a list of messages, one at least")
        options = template_options(body)
        try:
            text = self.tokenizer.apply_chat_template(
                [_plain(message) for message in messages],
                tools=body.get("tools"),
                add_generation_prompt=bool(body.get("add_generation_prompt", True)),
                tokenize=False,
                **options,
            )
        except InputError:
            raise
        except Exception as error:  # no template, or one whose own checks fail: jinja's and transformers' errors
            raise InputError(f"messages: the model's chat template can't take them ({first_line(error)})") from None
        return self._ids(text, special=False)

    @torch.no_grad()
    def weights(self, prompts: Sequence[Sequence[int]]) -> Tensor:
        """Return the router's fusion weights (prompts, experts) on the CPU, for token ids of each prompt."""
        rows = [tokens(ids[-self.served.max_length :]) for ids in prompts]
        with self._lock:
            return self._twin.route_all(rows).cpu()

    def adapters(self, prompts: Sequence[Sequence[int]]) -> list[str]:
        """Return the name of the model that answers each prompt."""
        return [nearest_adapter(weights, self.served) for weights in self.weights(prompts)]

    def _ids(self, prompt: Any, special: Any) -> list[int]:
        ids = prompt
        if isinstance(prompt, str):
            _require_unicode(prompt)
            with self._lock:
                ids = self.tokenizer(prompt, add_special_tokens=bool(special))["input_ids"]
        if not isinstance(ids, list):
            raise InputError(f"prompt: expected a text or token ids, or a list of them, not {shown(prompt)}")
        require_ids(ids, "prompt", vocabulary_size(self._twin.model.config))
        return ids


def _require_unicode(prompt: str) -> None:
    """Raise an InputError for a text with a half of a surrogate pair, which JSON may hold and no tokenizer takes."""
    try:
        prompt.encode()
    except UnicodeEncodeError as error:
        raise InputError(f"prompt: {shown(prompt[error.start])} is no character; correct the text") from None


def _plain(message: Any) -> Any:
    """Return a message whose content is one text. InputError for a content that the router can't read."""
    if not isinstance(message, dict):
        raise InputError(f"messages: expected objects with role and content, not {shown(message)}")
    parts = message.get("content")
    if not isinstance(parts, list):
        return message
    for part in parts:
        if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
            raise InputError("messages: the router reads texts alone; leave out other parts of a content")
    return {**message, "content": "\n".join(part["text"] for part in parts)}

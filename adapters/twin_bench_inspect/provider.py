"""The provider: a twin as a model of Inspect's."""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import anyio.to_thread
from inspect_ai._util.error import PrerequisiteError
from inspect_ai.model import ChatMessage, GenerateConfig, ModelAPI, ModelOutput
from inspect_ai.tool import ToolChoice, ToolInfo
from rich.markup import escape

from twin_bench.config import parse
from twin_bench.errors import InputError, RefusedError
from twin_bench.files import digest
from twin_bench.serving.engine import Ask, engine
from twin_bench.serving.prompts import encoded, in_template
from twin_bench.serving.settings import TwinSettings
from twin_bench_inspect.options import Options, options
from twin_bench_inspect.outputs import choice, output, token_logprobs

FORMAT = 2
"""The number of how an answer is found, which Inspect's cache holds in its key."""
MOST_TOKENS = 2048
"""The largest number of tokens of an answer where nobody says one, as in Inspect's `hf`."""
IDENTITY = "twin:"
"""What begins the address that the provider gives itself."""


class Arguments(TwinSettings):
    """The arguments that `-M` gives: the settings of a twin, and its directory where the model's name is another."""

    model_path: str | None = None


class TwinMerged(ModelAPI):  # type: ignore[misc]
    """Answers Inspect's requests with a twin of language models.

    The requests of one model that are asked at the same time are answered together. A request waits in a thread of its
    own, so Inspect's event loop goes on. An answer depends on nothing but its request.
    """

    def __init__(
        self,
        model_name: str,
        base_url: str | None = None,
        api_key: str | None = None,
        config: GenerateConfig = GenerateConfig(),  # noqa: B008 (Inspect's own signature)
        **model_args: Any,
    ) -> None:
        """Load the twin in the directory `model_name`. `model_args` are those of `-M`: see `Arguments`.

        Raises:
            PrerequisiteError: an argument that is unknown or out of range, no language model's twin there, or a
                damaged one. Inspect prints its message alone.
        """
        super().__init__(model_name=model_name, base_url=base_url, api_key=api_key, config=config)
        try:
            if base_url is not None and not base_url.startswith(IDENTITY):
                raise InputError("a twin runs in this process; leave out --model-base-url")
            given = parse(Arguments, model_args, "-M").model_dump()
            directory = Path(given.pop("model_path") or model_name).expanduser().resolve()
            self._settings = TwinSettings(**given)
            self._engine = engine(str(directory), self._settings)
            options(config, self.max_tokens())  # the command line's, before a task is run
        except InputError as error:
            raise PrerequisiteError(escape(f"ERROR: twin_merged/{model_name}: {error}")) from None
        # Inspect's cache knows a model by name and address. The name does not say what is in the directory, nor -M.
        self.base_url = IDENTITY + digest({"format": FORMAT, **self._engine.identity})

    async def generate(
        self, input: list[ChatMessage], tools: list[ToolInfo], tool_choice: ToolChoice, config: GenerateConfig
    ) -> ModelOutput:
        """Answer one request. InputError for one that can't be answered."""
        if tools:
            raise InputError(f"the task has tools ({', '.join(tool.name for tool in tools)}), and a twin calls none")
        asked = options(config, self.max_tokens())
        # A limiter of its own: Inspect bounds the requests, and its other threads must not wait for a batch.
        return await anyio.to_thread.run_sync(
            self._answered, input, asked, abandon_on_cancel=True, limiter=anyio.CapacityLimiter(1)
        )

    def _answered(self, messages: Sequence[ChatMessage], asked: Options) -> ModelOutput:
        twin = self._engine.twin
        templated = bool(twin.tokenizer.chat_template)
        turns = [{"role": message.role, "content": _text(message)} for message in messages]
        text = in_template(twin.tokenizer, turns) if templated else _plain(turns)
        prompt = tuple(encoded(twin.tokenizer, text, templated=templated))
        room = twin.max_length - len(prompt)
        if room < 1:
            says = f"a prompt of {len(prompt)} tokens leaves no room for an answer; the window is {twin.max_length}"
            # No text: a scorer that looks for a word must not find it in a message.
            return ModelOutput.from_content(self.model_name, "", stop_reason="model_length", error=says)
        ask = Ask(
            prompt=prompt,
            max_tokens=min(asked.max_tokens, room),
            temperature=asked.temperature,
            top_p=asked.top_p,
            completions=asked.num_choices,
            stop=asked.stop_seqs,
            seed=_seed(asked, text),
            top_k=asked.top_k,
            likeliest=asked.top_logprobs,
        )
        found = self._engine.ask(ask)
        at_length = "max_tokens" if asked.max_tokens <= room else "model_length"
        choices = [
            choice(twin.tokenizer, self.model_name, one, ask.stop, logprobs=asked.logprobs, at_length=at_length)
            for one in found
        ]
        if asked.prompt_logprobs:
            (scored,) = self._engine.ask(replace(ask, max_tokens=0))
            for one in choices:
                one.prompt_logprobs = token_logprobs(twin.tokenizer, scored, slice(1, None))
        return output(self.model_name, choices, len(prompt), found)

    def max_tokens(self) -> int:
        """Return the largest number of tokens of an answer where nobody says one: half of the window at most."""
        return min(MOST_TOKENS, max(self._engine.twin.max_length // 2, 1))

    def max_connections(self) -> int:
        """Return how many requests Inspect sends at the same time: one batch waits while another is answered."""
        return 2 * self._settings.batch_size

    def collapse_user_messages(self) -> bool:
        """Return that Inspect joins a user's messages that follow each other, as for its `hf`."""
        return True


def _text(message: ChatMessage) -> str:
    """Return a message's text. Raise a RefusedError for a message that holds anything else."""
    if not isinstance(message.content, str):
        kinds = {content.type for content in message.content} - {"text"}
        if kinds:
            raise RefusedError(f"a message of role {message.role} holds {', '.join(sorted(kinds))}; a twin reads text")
    if getattr(message, "tool_calls", None):
        raise RefusedError(f"a message of role {message.role} calls a tool, and a twin calls none")
    return message.text


def _plain(turns: Sequence[Mapping[str, str]]) -> str:
    """Return the prompt of a model without a chat template: that of Inspect's `hf`."""
    return "".join(f"{turn['role']}: {turn['content']}\n" for turn in turns)


def _seed(asked: Options, text: str) -> str:
    """Return the seed of a request's draws.

    With the user's seed it depends on the prompt alone. Without one it is new for each request, so that the epochs of a
    sample differ. Where nothing is drawn, equal requests have equal seeds: they are answered once.
    """
    if not asked.temperature:
        return ""
    return secrets.token_hex(8) if asked.seed is None else f"{asked.seed}/{text}"

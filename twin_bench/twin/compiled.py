"""Compiled decoding: a step of a generation runs as one graph of operations, which a GPU starts at once.

A step of a small batch takes as long as the starts of its operations, and not as their products. torch.compile makes a
graph of a step. The graph reads the fusion weights, and the keys and values of all tokens, from tensors, so it serves
any weights and any texts. The keys and values lie in a cache of fixed length, so that all steps have the same shapes.
Batches of other numbers of rows or tokens use the same graph: it is compiled for one shape, and once more for all.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal

import torch
from transformers import StaticCache

from twin_bench.compat import SINCE_5, say_once
from twin_bench.errors import first_line
from twin_bench.twin.fusion import Fusion
from twin_bench.twin.memory import padded_length

Compiling = Literal["auto", "on", "off"]
"""When steps are compiled: `auto` on a CUDA device for lists with many steps, `on` wherever it is possible."""
COMPILING: tuple[Compiling, ...] = ("auto", "on", "off")
LEAST_STEPS = 512
"""The number of steps from which `auto` compiles. It is a guess: a compilation takes up to a minute."""
STEP_BY_STEP = frozenset(
    {
        *("max_new_tokens", "max_length", "do_sample", "temperature", "top_k", "top_p", "min_p", "typical_p"),
        *("repetition_penalty", "logits_processor", "stopping_criteria", "num_beams", "num_return_sequences"),
        *("pad_token_id", "eos_token_id", "bos_token_id", "return_dict_in_generate", "output_logits", "output_scores"),
        *("use_cache", "transformers_version", "_from_model_config", "decoder_start_token_id"),
    }
)
"""Options and settings of `generate` with which it runs the model once for each token. Others may run it otherwise."""


class CompiledSteps:
    """The compiled steps of one model's generations, and the cache that they write keys and values to.

    `failed` says that torch could not compile a step. Steps then run one operation at a time.
    """

    def __init__(self, model: Any, fusion: Fusion, **options: Any) -> None:
        """Make no graph yet: the first step does.

        Args:
            model: the transformers model with twin layers.
            fusion: what controls these layers.
            **options: of torch.compile; by default those that make a CUDA graph.
        """
        self._model, self._fusion = model, fusion
        self._step: Any = torch.compile(model.forward, **(options or {"mode": "reduce-overhead"}))
        self._cache: StaticCache | None = None
        self._shape = 0, 0
        self.failed = False

    @contextmanager
    def running(self, rows: int, length: int, argument: str) -> Iterator[dict[str, Any]]:
        """Run one call of `generate` in the block. Yield the options that it needs.

        Args:
            rows: the number of rows of the batch.
            length: the number of tokens of the longest prompt and its text.
            argument: the name under which the model takes keys and values.
        """
        plain = self._model.forward
        begun = False

        @functools.wraps(plain)  # generate reads the signature
        def forward(*args: Any, **kwargs: Any) -> Any:
            nonlocal begun
            if begun and not self.failed:
                return self._stepped(plain, args, kwargs)
            begun = True  # the prompts, whose number of tokens differs from batch to batch
            return plain(*args, **kwargs)

        self._model.forward = forward
        try:
            yield {argument: self._emptied(rows, padded_length(length)), "disable_compile": True}
        finally:
            del self._model.forward

    def forget(self) -> None:
        """Free the cache, which the next batch of the same shape would use again."""
        self._cache, self._shape = None, (0, 0)

    def _stepped(self, plain: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        from torch._dynamo.exc import TorchDynamoException  # a second or two, which only compiling should take

        torch.compiler.cudagraph_mark_step_begin()
        try:
            with self._fusion.compiled():
                return self._step(*args, **kwargs)
        except TorchDynamoException as error:  # nothing has run yet
            self.failed = True
            name = type(self._model).__name__
            say_once(f"{name} can't be compiled, and its steps run one operation at a time: {first_line(error)}")
            return plain(*args, **kwargs)

    def _emptied(self, rows: int, length: int) -> StaticCache:
        """Return an empty cache for `rows` rows of `length` tokens: the one before, if it has this shape."""
        if self._cache is None or self._shape != (rows, length):
            self.forget()  # before the next one takes memory
            self._cache, self._shape = StaticCache(config=self._model.config, max_cache_len=length), (rows, length)
        self._cache.reset()
        return self._cache


def filled(rows: tuple[int, ...], most: int) -> tuple[int, ...]:
    """Return the rows of a batch with its last one repeated: a power of 2 of them, or `most`, to run few numbers."""
    count = min(2 ** (len(rows) - 1).bit_length(), max(len(rows), most))
    return rows + rows[-1:] * (count - len(rows))


def runs_step_by_step(options: Mapping[str, Any], generation_config: Any) -> bool:
    """Return whether `generate` runs the model once for each token of a row, with these options and this config."""
    asked = {**generation_config.to_diff_dict(), **options}
    once = all(asked.get(name) in (None, 1) for name in ("num_beams", "num_return_sequences"))
    given = {name for name, value in asked.items() if value not in (None, False, 0)}
    return once and asked.get("use_cache") is not False and given <= STEP_BY_STEP


def compilable(model: Any, fusion: Fusion) -> bool:
    """Return whether a model's steps can be a graph; where not, it is said once.

    The model must be one that transformers lets compile, on one device, not quantised, without windows of attention.
    Experts that keep single entries of matrices choose what is multiplied by the weights' values.
    """
    why = ""
    if not SINCE_5:
        why = "that needs transformers 5"
    elif not getattr(model, "_can_compile_fullgraph", False):
        why = "transformers does not let it compile"
    elif "forward" in vars(model) or len(set(getattr(model, "hf_device_map", {}).values())) > 1:
        why = "something else runs its forward"
    elif any(getattr(layer, "is_sliding", True) for layer in StaticCache(config=model.config, max_cache_len=1).layers):
        why = "it has a window of attention"
    elif any(getattr(layer, "entries", None) is not None for layer in fusion.layers):
        why = "its experts keep single entries of matrices"
    elif not fusion.keeps_copies:
        why = "its weights are quantised or offloaded"
    elif type(fusion) is not Fusion or getattr(model.generation_config, "cache_implementation", None):
        why = "it chooses its own weights or cache"
    if why:
        say_once(f"{type(model).__name__}'s steps are not compiled: {why}")
    return not why

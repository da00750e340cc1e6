"""TwinCausalLM: a language model's twin. It scores and generates text, every row with weights of its own."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from transformers import DynamicCache
from transformers.modeling_outputs import CausalLMOutput

from twin_bench import compat
from twin_bench.checkpoints.skeleton import context_window
from twin_bench.data.task import TaskType
from twin_bench.errors import InputError
from twin_bench.twin.features import hidden_states, pool
from twin_bench.twin.fusion import Fusion
from twin_bench.twin.model import Encoded, Text, TwinModel, present
from twin_bench.twin.paper import install_separate
from twin_bench.twin.parts import Parts
from twin_bench.twin.plan import Group, batches, plan
from twin_bench.twin.prefix import Prefix, shared_in_group, shared_prefixes


class Scored(NamedTuple):
    """A continuation's score: its tokens' log-probabilities, (tokens,) on the CPU.

    float32, or float64 where the model is. `greedy` says whether each token is the most probable one.
    """

    log_probs: Tensor
    greedy: bool


class TwinCausalLM(TwinModel):
    """A twin of causal language models.

    Fusion weights come from the *context* alone: never from the text that is scored, never from padding.
    There is no head to choose, so `routed` is `standard`. Under `paper` the experts' LoRA factors A and B are merged,
    truncated and fused separately (see `twin_bench.twin.paper`), and the router is the one chosen on test rows.
    """

    task_type: ClassVar[TaskType] = "causal_lm"

    def _complete(self, parts: Parts) -> None:
        self.max_length = parts.max_length or context_window(self.model.config)
        if self.protocol == "paper" and parts.paper is not None:
            self.router = parts.paper.router
        output = self.model.get_output_embeddings()
        if output is not None:
            output.register_forward_pre_hook(_contiguous)

    def _install(self, model: Any, parts: Parts) -> Fusion:
        if self.protocol != "paper" or not parts.exclusive:
            return super()._install(model, parts)
        if parts.paper is None or parts.paper.separate is None:
            raise InputError(
                "protocol paper adds the factors of LoRA adapters: build the twin from adapters of one rank on the "
                "same matrices, with shared: task_arithmetic"
            )
        return install_separate(model, parts.paper.separate)

    @torch.no_grad()
    def features(self, inputs: Mapping[str, Tensor], layers: Sequence[int]) -> list[Tensor]:
        """Return what a router on each of `layers` reads: (batch, width) means over the tokens of a batch."""
        positions = _positions(inputs["input_ids"], inputs.get("attention_mask"))
        return super().features({**inputs, "position_ids": positions}, layers)

    def _feature_batches(
        self, rows: Sequence[Encoded], layers: Sequence[int], batch_size: int
    ) -> Iterator[tuple[Sequence[int], list[Tensor]]]:
        """Yield batches of rows and their features: what rows begin with alike is run once for all of them."""
        inputs = {row: inputs["input_ids"] for row, inputs in enumerate(rows)}
        limits = {row: len(ids) - 1 if self._prefix_argument else 0 for row, ids in inputs.items()}
        for shared in shared_prefixes(inputs, limits):
            begun: list[Tensor | float] = [0.0] * len(layers)
            prefix = Prefix(0, None)
            if shared.length:
                prefix = Prefix(shared.length, DynamicCache(config=self.model.config))
                ids = torch.tensor([inputs[shared.rows[0]][: shared.length]], device=self.device)
                kept = {"input_ids": ids, self._prefix_argument: prefix.cache, "use_cache": True}
                begun = [pool(state, None) * shared.length for state in hidden_states(self.model, kept, layers)]
            rest = {row: tokens(inputs[row][shared.length :]) for row in shared.rows}
            lengths = {row: len(one["input_ids"]) for row, one in rest.items()}
            for batch in batches(Group(shared.rows, None), lengths, batch_size, overhead=self.batch_overhead):
                given = self._after(prefix, self.collate([rest[row] for row in batch.rows]))
                count = torch.tensor([lengths[row] for row in batch.rows], device=self.device)[:, None]
                mask = given["attention_mask"][:, shared.length :]
                own = [pool(state, mask) * count for state in hidden_states(self.model, given, layers)]
                total = shared.length + count
                yield batch.rows, [(before + after) / total for before, after in zip(begun, own, strict=True)]

    def _after(self, prefix: Prefix, inputs: Mapping[str, Tensor]) -> dict[str, Any]:
        """Return what a forward takes of rows that a prefix stands before."""
        if prefix.cache is None:
            return {**inputs, "use_cache": False}
        mask = inputs["attention_mask"]
        seen = torch.cat([mask.new_ones(len(mask), prefix.length), mask], dim=1)
        places = torch.arange(prefix.length, seen.shape[1], device=mask.device).repeat(len(mask), 1)
        return {
            **inputs,
            "attention_mask": seen,
            "position_ids": places,  # a router on the embeddings leaves the cache empty, which would count as none
            self._prefix_argument: prefix.of(len(mask)),
            "use_cache": False,
        }

    def encode(self, texts: Sequence[Text], *, max_length: int | None = None) -> list[Encoded]:
        """Tokenise texts without padding; of one that is too long the last `max_length` tokens stay."""
        limit = max_length or self.max_length
        ids = [self.tokenizer(text if pair is None else f"{text}\n{pair}")["input_ids"] for text, pair in texts]
        return [tokens(row[-limit:]) for row in ids]

    @torch.no_grad()
    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        *,
        fusion_weights: Tensor | None = None,
        task: str | Sequence[str] | None = None,
    ) -> CausalLMOutput:
        """Run a batch, each row with its own weights.

        Args:
            input_ids: (batch, length).
            attention_mask: likewise, 0 on padding, on either side.
            fusion_weights: (batch, experts); None asks the router about the rows as they are: to score a
                continuation, give the weights of its context.
            task: of all rows, or of each; looked at where `routing` is `task` alone.

        Returns:
            An output whose `logits` are (batch, length, vocabulary).
        """
        self._check(input_ids, attention_mask)
        weights = self._weights_of(input_ids, attention_mask, fusion_weights, task)
        positions = _positions(input_ids, attention_mask)
        inputs = present({"input_ids": input_ids, "attention_mask": attention_mask, "position_ids": positions})
        logits: Tensor | None = None
        for group in plan(weights, [input_ids.shape[1]] * len(input_ids), self.costs):
            rows = torch.tensor(group.rows, device=input_ids.device)
            with self.fused(group, weights):
                out = self.model(**{name: tensor[rows] for name, tensor in inputs.items()}, use_cache=False).logits
            if logits is None:
                logits = out.new_empty(len(input_ids), *out.shape[1:])
            logits[rows] = out
        return CausalLMOutput(logits=logits)

    @torch.no_grad()
    def log_likelihoods(
        self,
        requests: Sequence[tuple[Sequence[int], Sequence[int]]],
        *,
        routed_on: Sequence[Sequence[int]] | None = None,
        tasks: Sequence[str] | None = None,
        fusion_weights: Tensor | None = None,
        batch_size: int = 8,
        max_length: int | None = None,
        progress: Callable[[int], None] | None = None,
    ) -> list[Scored]:
        """Return log p(continuation | context) of a list of requests, token by token.

        The list is answered as a whole: equal contexts are routed once, requests that share their input run
        once, rows are grouped by weights and fused once a group. Neither order nor batch size decides anything.

        Args:
            requests: (context, continuation) token ids, none empty.
            routed_on: what the router reads of each; by default its context.
            tasks: of each; needed where `routing` is `task`.
            fusion_weights: (requests, experts), in place of the router's.
            batch_size: rows a forward.
            max_length: tokens of an input; of a longer one the last are kept.
            progress: called with the number of requests done since the last call.
        """
        window = max_length or self.max_length
        for context, continuation in requests:
            self._check_tokens(context)
            self._check_tokens(continuation, "continuation")
            if len(continuation) > window:
                raise InputError(f"a continuation of {len(continuation)} tokens; the model's window is {window}")
        contexts = [context for context, _ in requests] if routed_on is None else routed_on
        weights = self._weights_of_rows([ids[-window:] for ids in contexts], tasks, fusion_weights, batch_size)
        inputs = [(*context, *continuation)[-window - 1 : -1] for context, continuation in requests]
        askers: dict[tuple[Any, ...], list[int]] = {}
        for row, key in enumerate(weights.tolist()):
            askers.setdefault((inputs[row], tuple(key)), []).append(row)
        sharing = {rows[0]: rows for _, rows in sorted(askers.items())}
        asked = [len(continuation) for _, continuation in requests]
        scores: dict[int, Scored] = {}
        lengths = [len(ids) for ids in inputs]
        starts = {row: lengths[row] - max(asked[asker] for asker in askers) for row, askers in sharing.items()}
        for batch, prefix in self.sharing(weights, inputs, starts, batch_size):
            kept = sorted({position for row in batch.rows for position in range(starts[row], lengths[row])})
            rest = [tokens(inputs[row][prefix.length :]) for row in batch.rows]
            logits = self._logits(rest, [position - prefix.length for position in kept], batch, weights, prefix)
            place = {position: index for index, position in enumerate(kept)}
            for row, row_logits in zip(batch.rows, logits, strict=True):
                for asker in sharing[row]:
                    at = [place[position] for position in range(lengths[row] - asked[asker], lengths[row])]
                    scores[asker] = _score(row_logits[at], requests[asker][1])
                if progress:
                    progress(len(sharing[row]))
        return [scores[row] for row in range(len(requests))]

    def sharing(
        self,
        weights: Tensor,
        inputs: Sequence[Sequence[int]],
        limits: Mapping[int, int],
        batch_size: int,
        *,
        steps: int = 0,
    ) -> Iterator[tuple[Group, Prefix]]:
        """Yield the batches that some rows of a list run in, each with what its rows' inputs begin with.

        Rows that are fused together and begin with the same tokens run those once; the keys and values are kept for
        as long as such rows come.

        Args:
            weights: (N, experts).
            inputs: N rows of tokens.
            limits: the rows to run, and how many of a row's tokens may belong to a prefix.
            batch_size: rows a batch.
            steps: tokens to be generated for each.
        """
        rows = sorted(limits)
        lengths = [len(inputs[row]) for row in rows]
        for planned in plan(weights[rows], lengths, self.costs, steps=steps, batch_size=batch_size):
            group = Group(tuple(rows[row] for row in planned.rows), planned.weights)
            may = limits if self._prefix_argument else dict.fromkeys(limits, 0)
            for one in shared_in_group(group, weights, inputs, may):
                first = Group(one.rows[:1], group.weights)
                prefix = Prefix(one.length, self._keys_and_values(inputs[one.rows[0]][: one.length], first, weights))
                rest = {row: len(inputs[row]) - one.length for row in one.rows}
                for batch in batches(
                    Group(one.rows, group.weights), rest, batch_size, steps=steps, overhead=self.batch_overhead
                ):
                    yield batch, prefix

    @torch.no_grad()
    def _keys_and_values(self, ids: Sequence[int], group: Group, weights: Tensor) -> DynamicCache | None:
        """Return the cache of one row of tokens, run as a `group` of that row asks; None of no tokens."""
        if not len(ids):
            return None
        cache = DynamicCache(config=self.model.config)
        with self.fused(group, weights):
            kept = {self._prefix_argument: cache, "use_cache": True}
            self.model.base_model(torch.tensor([list(ids)], device=self.device), **kept)
        return cache

    @torch.no_grad()
    def generate(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        *,
        fusion_weights: Tensor | None = None,
        task: str | Sequence[str] | None = None,
        **options: Any,
    ) -> Tensor:
        """Continue a batch of prompts with a KV cache, each row with its own weights.

        Args:
            input_ids: (batch, length), padded on the left.
            attention_mask: likewise, 0 on padding.
            fusion_weights: (batch, experts); None asks the router about the prompts.
            task: of all rows, or of each; looked at where `routing` is `task` alone.
            **options: those of transformers' `generate` (max_new_tokens, do_sample, num_beams, ...).

        Returns:
            Prompts and continuations as transformers returns them: (batch, length + new tokens).
        """
        self._check(input_ids, attention_mask)
        if attention_mask is not None and not attention_mask[:, -1].all():
            raise InputError("prompts to generate from are padded on the left")
        weights = self._weights_of(input_ids, attention_mask, fusion_weights, task)
        options.setdefault("pad_token_id", self.tokenizer.pad_token_id)
        steps = int(options.get("max_new_tokens") or 20)
        with self.generating(weights, input_ids.shape[1], steps, options):
            generated: Tensor = self.model.generate(
                input_ids=input_ids, **present({"attention_mask": attention_mask}), **options
            )
        return generated

    def generating(
        self, weights: Tensor, length: int, steps: int, options: Mapping[str, Any]
    ) -> AbstractContextManager[None]:
        """Run transformers' `generate` inside with each prompt's weights (batch, experts).

        Args:
            weights: fused where all rows have the same and it is worth it, else a row's own.
            length: of the prompts.
            steps: tokens to be generated.
            options: those of `generate`: with beams or several sequences a prompt has as many rows.
        """
        groups = plan(weights, [length] * len(weights), self.costs, steps=steps, batch_size=len(weights))
        if len(groups) == 1 and groups[0].weights is not None:
            return self.fused(groups[0], weights)
        copies = max(int(options.get("num_beams") or 1), int(options.get("num_return_sequences") or 1))
        rows = weights.repeat_interleave(copies, dim=0)
        return self.fused(Group(tuple(range(len(rows))), None), rows)

    @torch.no_grad()
    def next_logits(self, inputs: Sequence[Sequence[int]], weights: Tensor, batch: Group, prefix: Prefix) -> Tensor:
        """Return the logits (batch, vocabulary) of the token after each row of a batch of `sharing`."""
        rest = [tokens(inputs[row][prefix.length :]) for row in batch.rows]
        ends = [len(row["input_ids"]) - 1 for row in rest]
        kept = sorted(set(ends))
        logits = self._logits(rest, kept, batch, weights, prefix)
        return logits[torch.arange(len(ends)), [kept.index(end) for end in ends]]

    @torch.no_grad()
    def probe(self, encoded: Sequence[Encoded], tasks: Sequence[str], weights: Tensor) -> list[Tensor]:
        """Return the logits (vocabulary,) of each row's next token, on the CPU."""
        inputs = [row["input_ids"] for row in encoded]
        found: dict[int, Tensor] = {}
        for batch, prefix in self.sharing(weights, inputs, {row: len(ids) - 1 for row, ids in enumerate(inputs)}, 8):
            found.update(zip(batch.rows, self.next_logits(inputs, weights, batch, prefix).cpu(), strict=True))
        return [found[row] for row in range(len(encoded))]

    def classify(self, *_: Any, **__: Any) -> Any:
        """Refuse: there is no head to classify with."""
        raise InputError("a causal_lm twin does not classify; build a twin of sequence classifiers for that")

    def _logits(
        self, rows: Sequence[Encoded], kept: Sequence[int], group: Group, weights: Tensor, prefix: Prefix | None = None
    ) -> Tensor:
        """Return the logits of one batch of a plan at the positions `kept`, (batch, kept, vocabulary).

        `rows` and `kept` begin after the prefix, if there is one.
        """
        inputs = self._after(prefix or Prefix(0, None), self.collate(rows))
        positions = torch.tensor(kept, device=self.device)
        with self.fused(group, weights):
            if self._selects_logits:
                logits: Tensor = self.model(**inputs, logits_to_keep=positions).logits
                return logits
            return self.model(**inputs).logits[:, positions]

    @functools.cached_property
    def _prefix_argument(self) -> str:
        """The model's name for the keys and values of what rows begin with alike; empty where they can't share them."""
        return compat.prefix_argument(self.model) or ""

    @functools.cached_property
    def _selects_logits(self) -> bool:
        """Whether the model can leave out the logits that nobody asks for, which are most of its memory."""
        return compat.selects_logits(self.model)

    def _weights_of(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None,
        fusion_weights: Tensor | None,
        task: str | Sequence[str] | None,
    ) -> Tensor:
        """Return the fusion weights of a batch: those given, else as `routing` says."""
        rows = len(input_ids)
        if fusion_weights is not None:
            return self.checked_weights(fusion_weights, rows)
        if self.routing == "router" and self.expert_names:
            return self.simplest(self.route(input_ids, attention_mask))
        return self.route_all([{}] * rows, [task] * rows if isinstance(task, str) else task)

    def _weights_of_rows(
        self, ids: Sequence[Sequence[int]], tasks: Sequence[str] | None, given: Tensor | None, batch_size: int
    ) -> Tensor:
        if given is not None:
            return self.checked_weights(given, len(ids))
        return self.route_all([tokens(row) for row in ids], tasks, batch_size=batch_size)

    def _check(self, input_ids: Tensor, attention_mask: Tensor | None) -> None:
        if input_ids.shape[1] > context_window(self.model.config):
            raise InputError(
                f"an input of {input_ids.shape[1]} tokens; the model's window is {context_window(self.model.config)}"
            )
        if not input_ids.shape[1] or (attention_mask is not None and not attention_mask.any(dim=1).all()):
            raise InputError("an empty context: give it one token at least (the tokenizer's bos or eos)")
        for row in (input_ids.min(), input_ids.max()) if input_ids.numel() else ():
            self._check_tokens([int(row)])

    def _check_tokens(self, ids: Sequence[int], what: str = "context") -> None:
        if not len(ids):
            raise InputError(f"an empty {what}: give it one token at least (a context: the tokenizer's bos or eos)")
        vocabulary = self.model.config.vocab_size
        if min(ids) < 0 or max(ids) >= vocabulary:
            wrong = min(ids) if min(ids) < 0 else max(ids)
            raise InputError(f"token {wrong} in a {what}: the model's vocabulary has {vocabulary} tokens")


def tokens(ids: Sequence[int]) -> Encoded:
    """Return token ids as an encoded row without padding."""
    return {"input_ids": list(ids), "attention_mask": [1] * len(ids)}


def _contiguous(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Copy what the output layer reads, where it is a slice.

    On a CPU torch 2.13 multiplies the last positions of a bfloat16 batch, which are no contiguous tensor, a hundred
    times slower than a copy of them.
    """
    return tuple(argument.contiguous() if isinstance(argument, Tensor) else argument for argument in args)


def _positions(input_ids: Tensor, attention_mask: Tensor | None) -> Tensor:
    """Return each token's position in its own row, (batch, length): padding on the left does not count."""
    mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
    return (mask.long().cumsum(dim=1) - 1).clamp(min=0)


def _score(logits: Tensor, continuation: Sequence[int]) -> Scored:
    """Return the score of a continuation under the logits (tokens, vocabulary) that predict it."""
    asked = torch.tensor(list(continuation), device=logits.device)
    exact = torch.promote_types(logits.dtype, torch.float32)
    log_probs = torch.log_softmax(logits, dim=-1, dtype=exact).gather(1, asked[:, None])[:, 0]
    return Scored(log_probs.cpu(), bool((logits.argmax(dim=-1) == asked).all()))

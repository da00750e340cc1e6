"""TwinCausalLM: a twin of language models. It runs batches, in which every row has its own fusion weights.

Lists of requests are answered by `twin_bench.twin.requests`, which decides what runs together.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.modeling_outputs import CausalLMOutput

from twin_bench.checkpoints.skeleton import context_window
from twin_bench.compat import continues_caches, first_position, prefix_argument, selects_logits
from twin_bench.data.task import TaskType
from twin_bench.errors import InputError
from twin_bench.twin.arguments import checked_batch
from twin_bench.twin.compiled import LEAST_STEPS, CompiledSteps, compilable, runs_step_by_step
from twin_bench.twin.encoded import Encoded, tokens
from twin_bench.twin.features import Read, hidden_states, pool_after, reads_of
from twin_bench.twin.language import PROBE_BATCH, TwinLanguageModel
from twin_bench.twin.memory import ONE_FORWARD, Use
from twin_bench.twin.plan import Group, batches, plan
from twin_bench.twin.prefix import (
    NO_PREFIX,
    Prefix,
    affordable,
    first_of,
    shared_in_group,
    shared_prefixes,
    worth_their_batches,
)

NOT_CAUSAL: dict[TaskType, str] = {
    "sequence_classification": "a classifier twin does not generate text",
    "seq2seq_lm": "an encoder-decoder's twin does not generate text behind a prompt (lm-eval serves it)",
}
"""Why a twin of another kind can't stand for a causal language model, to begin an error message."""


class TwinCausalLM(TwinLanguageModel):
    """A twin of causal language models. What a protocol means for it: TwinLanguageModel."""

    task_type: ClassVar[TaskType] = "causal_lm"

    @torch.no_grad()
    def features(self, inputs: Mapping[str, Tensor], layers: Sequence[int | Read]) -> list[Tensor]:
        """Return the features that a router on each of `layers` reads: (batch, width), of each row's own tokens."""
        positions = self._positions(inputs["input_ids"], inputs.get("attention_mask"))
        return super().features({**inputs, "position_ids": positions}, layers)

    def _feature_batches(
        self, rows: Sequence[Encoded], layers: Sequence[int | Read], batch_size: int
    ) -> Iterator[tuple[Sequence[int], list[Tensor]]]:
        """Yield the indices and the features of one batch of rows after the other. Shared prefixes are run once."""
        reads = reads_of(layers)
        inputs = {row: inputs["input_ids"] for row, inputs in enumerate(rows)}
        budget = self.budget(Use(shared=True))
        limits = {row: len(ids) - 1 if self.shares_prefixes else 0 for row, ids in inputs.items()}
        for shared in affordable(shared_prefixes(inputs, limits), inputs, budget):
            begun: list[Tensor | None] = [None] * len(reads)
            prefix = NO_PREFIX
            if shared.length:
                if first_of(shared, budget).crowded:
                    self.release()
                prefix = Prefix(shared.length, DynamicCache(config=self.model.config))
                ids = torch.tensor([inputs[shared.rows[0]][: shared.length]], device=self.device)
                kept = {"input_ids": ids, self._prefix_argument: prefix.cache, "use_cache": True}
                with self.fusion.shared():
                    begun = [*hidden_states(self.backbone, kept, [read.layer for read in reads])]
            lengths = {row: len(inputs[row]) - shared.length for row in shared.rows}
            alike = Group(shared.rows, torch.zeros(self.fusion.experts))
            for batch in self.shared_batches(alike, lengths, batch_size, shared.length):
                rest = [tokens(inputs[row][shared.length :]) for row in batch.rows]
                given = self._after(prefix, self.collate(rest))
                mask = given["attention_mask"][:, shared.length :]
                with self.fusion.shared():
                    states = hidden_states(self.backbone, given, [read.layer for read in reads])
                yield (
                    batch.rows,
                    [
                        pool_after(before, shared.length, state, mask, read.pooling)
                        for before, state, read in zip(begun, states, reads, strict=True)
                    ],
                )

    def _after(self, prefix: Prefix, inputs: Mapping[str, Tensor]) -> dict[str, Any]:
        """Return the arguments of a forward of rows that come after a prefix."""
        if prefix.cache is None:
            return {**inputs, "use_cache": False}
        mask = inputs["attention_mask"]
        seen = torch.cat([mask.new_ones(len(mask), prefix.length), mask], dim=1)
        places = torch.arange(prefix.length, seen.shape[1], device=mask.device).repeat(len(mask), 1)
        return {
            **inputs,
            "attention_mask": seen,
            # A router on the embeddings leaves the cache empty, and transformers would count positions from 0.
            "position_ids": places,
            self._prefix_argument: prefix.for_rows(len(mask)),
            "use_cache": False,
        }

    @torch.no_grad()
    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        *,
        fusion_weights: Tensor | None = None,
        task: str | Sequence[str] | None = None,
    ) -> CausalLMOutput:
        """Run a batch. Each row has its own fusion weights.

        Args:
            input_ids: (batch, length).
            attention_mask: (batch, length), 0 on padding, which may be on either side. None where there is no padding.
            fusion_weights: (batch, experts). None asks the router about the whole rows. To score a continuation, give
                the weights of its context.
            task: the task of all rows, or a sequence with each row's. It is used only where `routing` is `task`.

        Returns:
            An output whose `logits` are (batch, length, vocabulary) in the model's dtype.

        Raises:
            TypeError: an argument that is to be a tensor is none.
            InputError: an empty batch or row, a row over the model's window, a token outside its vocabulary, inputs or
                fusion weights of another shape, dtype or range, a batch that does not fit into `max_memory`, or logits
                that are not finite.
        """
        inputs = checked_batch({"input_ids": input_ids, "attention_mask": attention_mask}, self.model)
        length = input_ids.shape[1]
        self.require_batch(len(input_ids), length, length)
        weights = self._weights_of(inputs, fusion_weights, task)
        inputs["position_ids"] = self._positions(input_ids, attention_mask)
        return CausalLMOutput(logits=self._grouped_logits(inputs, weights, length, length, attention_mask))

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
        """Continue a batch of prompts with a KV cache. Each row has its own fusion weights.

        Args:
            input_ids: (batch, length), padded on the left.
            attention_mask: (batch, length), 0 on padding. None where there is no padding.
            fusion_weights: (batch, experts). None asks the router about the prompts.
            task: the task of all rows, or a sequence with each row's. It is used only where `routing` is `task`.
            **options: options of transformers' `generate` (max_new_tokens, do_sample, num_beams, ...). None stands for
                transformers' default.

        Returns:
            What transformers returns: prompts and continuations, (batch, length + new tokens) int64, unless an option
            asks for another output.

        Raises:
            TypeError: an argument that is to be a tensor is none.
            InputError: an empty batch or prompt, padding on the right, a prompt with its new tokens over the model's
                window, a token outside its vocabulary, inputs or fusion weights of another shape, dtype or range, an
                option that transformers refuses, a batch that does not fit into `max_memory`, or logits that are not
                finite.
        """
        inputs = checked_batch({"input_ids": input_ids, "attention_mask": attention_mask}, self.model)
        if attention_mask is not None and not attention_mask[:, -1].all():
            raise InputError("prompts to generate from are padded on the left")
        options = {name: value for name, value in options.items() if value is not None}
        steps = self._new_tokens(input_ids.shape[1], options)
        use = Use(steps, sequences=self.sequences(options))
        self.require_batch(len(input_ids), input_ids.shape[1], use=use)
        weights = self._weights_of(inputs, fusion_weights, task)
        compiled = self.compiles(steps)
        try:
            generated: Tensor = self._generated(inputs, weights, steps, {**options, "compiled": compiled})
        finally:
            if compiled:
                self.steps.forget()
        return generated

    @torch.no_grad()
    def generate_batch(
        self,
        inputs: Mapping[str, Tensor],
        group: Group,
        weights: Tensor,
        *,
        compiled: bool = False,
        prefix: Prefix = NO_PREFIX,
        **options: Any,
    ) -> Any:
        """Run transformers' `generate` on one batch of a plan.

        Args:
            inputs: `input_ids` and `attention_mask` (batch, length), padded on the left.
            group: the rows of the batch.
            weights: (N, experts), the fusion weights of the plan, which `group.rows` index.
            compiled: whether the steps run as a graph where they can, as `compiles` says. Its cache is kept until
                `steps.forget` is called.
            prefix: the tokens that all prompts begin with, as `prefix` ran them with the same weights. It must be empty
                where steps are compiled, and unless `generates_after_prefixes`.
            **options: options of `generate`. With beams or several sequences a prompt takes several rows.

        Returns:
            What `generate` returns.
        """
        options.setdefault("pad_token_id", self.tokenizer.pad_token_id)
        compiled = compiled and runs_step_by_step(options, self.model.generation_config)
        group, weights = self._by_sequence(group, weights, options)
        with self.fused(group, weights, steps=not compiled), self._finite_steps(group, weights):
            if prefix.cache is not None:
                padding = (inputs["attention_mask"] == 0).sum(dim=1).tolist()
                options[self._prefix_argument] = prefix.to_generate(padding)
            if not compiled:
                return self.model.generate(**inputs, **options)
            rows, length = inputs["input_ids"].shape
            with self.steps.running(rows, length + options["max_new_tokens"], self._prefix_argument) as needed:
                return self.model.generate(**inputs, **options, **needed)

    @functools.cached_property
    def steps(self) -> CompiledSteps:
        """The compiled steps of this twin's generations."""
        return CompiledSteps(self.model, self.fusion)

    def compiles(self, steps: int) -> bool:
        """Return whether the steps of a list of requests are compiled, of which there are about `steps`."""
        if self.compiling == "auto" and (self.device.type != "cuda" or steps < LEAST_STEPS):
            return False
        return self.compiling != "off" and self.shares_prefixes and compilable(self.model, self.fusion)

    @torch.no_grad()
    def logits(
        self,
        rows: Sequence[Sequence[int]],
        positions: Sequence[int],
        group: Group,
        weights: Tensor,
        prefix: Prefix = NO_PREFIX,
    ) -> Tensor:
        """Return the logits of one batch of a plan at some positions, (batch, positions, vocabulary).

        Args:
            rows: each row's tokens after the prefix, none empty. Rows may differ in length.
            positions: the positions in `rows` whose logits are returned, for every row.
            group: the rows of the batch.
            weights: (N, experts), the fusion weights of the plan, which `group.rows` index.
            prefix: the tokens before all rows, as `prefix` ran them with the same weights.
        """
        inputs = self._after(prefix, self.collate([tokens(row) for row in rows]))
        asked = torch.tensor(positions, device=self.device)
        with self.fused(group, weights):
            selected = {"logits_to_keep": asked} if self._selects_logits else {}
            logits: Tensor = self.model(**inputs, **selected).logits
        if not selected:
            logits = logits[:, asked]
        self._require_finite(logits, inputs["attention_mask"][:, prefix.length + asked], group, weights)
        return logits

    def last_logits(
        self, rows: Sequence[Sequence[int]], group: Group, weights: Tensor, prefix: Prefix = NO_PREFIX
    ) -> Tensor:
        """Return the logits of the token after each row, (batch, vocabulary). The arguments are those of `logits`."""
        ends = [len(row) - 1 for row in rows]
        asked = sorted(set(ends))
        logits = self.logits(rows, asked, group, weights, prefix)
        places = torch.tensor([asked.index(end) for end in ends], device=logits.device)
        return logits[torch.arange(len(ends), device=logits.device), places]

    @torch.no_grad()
    def prefix(self, ids: Sequence[int], group: Group, weights: Tensor) -> Prefix:
        """Run the tokens that several rows begin with, and return their keys and values.

        Args:
            ids: the tokens of the prefix. No tokens make an empty prefix.
            group: one of those rows, with the fused weights of their group or None.
            weights: (N, experts), the fusion weights of the plan, which `group.rows` index.
        """
        if not len(ids):
            return NO_PREFIX
        cache = DynamicCache(config=self.model.config)
        with self.fused(group, weights):
            kept = {self._prefix_argument: cache, "use_cache": True}
            self.model.base_model(torch.tensor([list(ids)], device=self.device), **kept)
        return Prefix(len(ids), cache)

    @property
    def shares_prefixes(self) -> bool:
        """Whether rows can share the keys and values of a prefix. A state-space model's can't."""
        return bool(self._prefix_argument)

    def generates_after_prefixes(self, options: Mapping[str, Any]) -> bool:
        """Return whether prompts that are continued with these options of `generate` can share a prefix."""
        plainly = runs_step_by_step(options, self.model.generation_config)
        return plainly and self.shares_prefixes and continues_caches(self.model)

    def prefixed(
        self,
        weights: Tensor,
        inputs: Sequence[Sequence[int]],
        limits: Mapping[int, int],
        batch_size: int,
        use: Use = ONE_FORWARD,
    ) -> Iterator[tuple[Group, Prefix]]:
        """Yield the batches of a plan, each with the prefix that its rows share.

        A prefix is run before the first of its batches. It is kept until the last of them.

        Args:
            weights: (N, experts).
            inputs: N rows of tokens.
            limits: the rows to run, and the number of each one's tokens that a prefix may contain.
            batch_size: the largest number of rows in a batch.
            use: what the batches have in common, such as the number of tokens to generate for each row.
        """
        rows = sorted(limits)
        may = limits if self.shares_prefixes else dict.fromkeys(limits, 0)
        lengths = {row: len(inputs[row]) for row in rows}
        budget = self.budget(use, {row: lengths[row] - limits[row] for row in rows})
        sizes: Any = {"steps": use.steps, "batch_size": batch_size}
        for group in plan(weights, lengths, self.costs, rows=rows, budget=budget, **sizes):
            found = shared_in_group(group, weights, inputs, may)
            if use.steps:
                more = self.costs.one_more(use.steps, fused=group.weights is not None)
                found = worth_their_batches(found, more, batch_size)
            for shared in affordable(found, inputs, budget, group.weights):
                prefix = NO_PREFIX
                if shared.length:
                    first = first_of(shared, budget, group.weights)
                    prefix = self.prefix(inputs[shared.rows[0]][: shared.length], first, weights)
                rest = {row: lengths[row] - shared.length for row in shared.rows}
                alike, left = Group(shared.rows, group.weights), budget and budget.after(shared.length)
                for batch in batches(alike, rest, costs=self.costs, budget=left, weights=weights, **sizes):
                    yield batch, prefix

    def probe(self, encoded: Sequence[Encoded], tasks: Sequence[str], weights: Tensor) -> list[Tensor]:
        """Return the logits of each row's next token: (vocabulary,) each, on the CPU."""
        inputs = [row["input_ids"] for row in encoded]
        found: dict[int, Tensor] = {}
        for batch in self.planned(weights, [len(ids) for ids in inputs], PROBE_BATCH):
            logits = self.last_logits([inputs[row] for row in batch.rows], batch, weights)
            found.update(zip(batch.rows, logits.cpu(), strict=True))
        return [found[row] for row in range(len(encoded))]

    @functools.cached_property
    def _prefix_argument(self) -> str:
        """The name under which the model takes a prefix's keys and values. It is empty if it can't share them."""
        return prefix_argument(self.model) or ""

    @functools.cached_property
    def _first_position(self) -> int:
        """The position of a row's first token, where a row's positions are given."""
        return first_position(self.model)

    @functools.cached_property
    def _selects_logits(self) -> bool:
        """Whether the model can compute logits at given positions only. All of them would take most of its memory."""
        return selects_logits(self.model)

    def _new_tokens(self, length: int, options: Mapping[str, Any]) -> int:
        """Return the largest number of tokens that `generate` adds with these options. It is bounded by the window."""
        steps, total = self._asked_tokens(options, length)
        window = context_window(self.model.config)
        if steps < 1:
            raise InputError(f"max_length {total}: the prompts have {length} tokens; give max_new_tokens")
        if length + steps > window:
            raise InputError(
                f"prompts of {length} tokens and {steps} to generate; the model's window is {window}: give "
                "max_new_tokens"
            )
        return steps

    def _positions(self, input_ids: Tensor, attention_mask: Tensor | None) -> Tensor:
        """Return each token's position in its own row, (batch, length). Padding on the left does not count."""
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        return (mask.long().cumsum(dim=1) - 1).clamp(min=0) + self._first_position

"""TwinLanguageModel: what the twins of causal language models and of encoder-decoders have in common."""

from __future__ import annotations

import abc
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from twin_bench.checkpoints.finite import all_finite
from twin_bench.checkpoints.skeleton import context_window
from twin_bench.errors import InputError, UnsuitedError, first_line
from twin_bench.twin.arguments import require_count, require_ids, require_texts, tasks_of, vocabulary_size
from twin_bench.twin.compiled import Compiling
from twin_bench.twin.encoded import Encoded, Text, tokens
from twin_bench.twin.finite import peaks, require_finite_logits
from twin_bench.twin.fusion import Fusion
from twin_bench.twin.memory import Use
from twin_bench.twin.model import TwinModel
from twin_bench.twin.paper import install_paper_layers
from twin_bench.twin.parts import Parts
from twin_bench.twin.plan import Group, batches, plan

PROBE_BATCH = 8
"""The number of rows in a forward of `probe`."""

DEFAULT_LENGTH = 20
"""The number of tokens that transformers' `generate` adds where nothing says how many."""


class TwinLanguageModel(TwinModel):
    """A twin of models that generate text: a TwinCausalLM or a TwinSeq2Seq.

    The router reads only the *context*: never the text that is scored, and never padding. A language model has no head
    per task, so the protocol `routed` is the same as `standard`. Under `paper` the experts' LoRA factors A and B are
    merged, truncated and fused separately (`twin_bench.twin.paper`), and the router is the one chosen on test rows.

    `compiling` says when the steps of a generation are compiled (`twin_bench.twin.compiled`). An encoder-decoder's
    never are.
    """

    compiling: Compiling = "off"

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
        if parts.paper is None or parts.paper.factors is None:
            raise UnsuitedError(
                "protocol paper adds the factors of LoRA adapters: build the twin from adapters of one rank on the "
                "same matrices, with shared: task_arithmetic and exclusive: a density or a rank alone"
            )
        return install_paper_layers(model, parts.paper.factors)

    def encode(self, texts: Sequence[Text], *, max_length: int | None = None) -> list[Encoded]:
        """Tokenise texts without padding. Of a text that is too long, the last `max_length` tokens are kept."""
        require_texts(texts)
        limit = self.max_length if max_length is None else max_length
        limit = require_count(limit, "max_length")
        ids = [self.tokenizer(text if pair is None else f"{text}\n{pair}")["input_ids"] for text, pair in texts]
        return [tokens(row[-limit:]) for row in ids]

    @abc.abstractmethod
    def generate_batch(self, inputs: Mapping[str, Tensor], group: Group, weights: Tensor, **options: Any) -> Any:
        """Run transformers' `generate` on one batch of a plan."""

    def _grouped_logits(
        self, inputs: Mapping[str, Tensor], weights: Tensor, length: int, positions: int, mask: Tensor | None
    ) -> Tensor:
        """Return the logits (batch, tokens, vocabulary) of a batch whose rows have fusion weights of their own.

        Args:
            inputs: the arguments of the model's forward, (batch, ...) each.
            weights: (batch, experts).
            length: the number of tokens of a row, for the plan.
            positions: the number of them whose logits are computed.
            mask: (batch, tokens), 0 where logits need not be finite, or None.
        """
        rows = len(weights)
        budget = self.budget(asked=dict.fromkeys(range(rows), positions))
        lengths = [length] * rows
        planned = plan(weights, lengths, self.costs, budget=budget)
        groups = [batch for group in planned for batch in batches(group, lengths, rows, self.costs, budget=budget)]
        logits: Tensor | None = None
        for group in groups:
            own = torch.tensor(group.rows, device=self.device)
            with self.fused(group, weights):
                out = self.model(**{name: tensor[own] for name, tensor in inputs.items()}, use_cache=False).logits
            self._require_finite(out, None if mask is None else mask[own], group, weights)
            if len(groups) == 1:  # the rows are in order, and a copy of all logits would take memory
                return out
            if logits is None:
                logits = out.new_empty(rows, *out.shape[1:])
            logits[own] = out
        assert logits is not None
        return logits

    def _generated(self, inputs: Mapping[str, Tensor], weights: Tensor, steps: int, options: Mapping[str, Any]) -> Any:
        """Return what transformers' `generate` returns for a batch whose rows have fusion weights of their own.

        Raises:
            InputError: an option that transformers refuses, or logits that are not finite.
        """
        rows, length = inputs["input_ids"].shape
        options = {**options, "max_new_tokens": steps}
        options.pop("max_length", None)  # its value is in `steps`
        budget = self.budget(Use(steps, sequences=self.sequences(options)))
        groups = plan(weights, [length] * rows, self.costs, steps=steps, batch_size=rows, budget=budget)
        fuses = groups[0].weights is not None and (budget is None or budget.fits(rows, length, 1, fused=True))
        crowded = not fuses and budget is not None and budget.crowded(rows, length, 1)
        group = groups[0] if len(groups) == 1 and fuses else Group(tuple(range(rows)), None, crowded)
        try:
            return self.generate_batch(inputs, group, weights, **options)
        except InputError:
            raise
        except ValueError as error:  # of an option, by transformers
            raise InputError(f"generate: {first_line(error)}") from error

    def _by_sequence(self, group: Group, weights: Tensor, options: Mapping[str, Any]) -> tuple[Group, Tensor]:
        """Return the group and the weights of a batch in which a row takes a place for each beam or sequence of it."""
        copies = self.sequences(options)
        if group.weights is not None or copies == 1:
            return group, weights
        weights = weights[list(group.rows)].repeat_interleave(copies, dim=0)
        return group._replace(rows=tuple(range(len(weights)))), weights

    def sequences(self, options: Mapping[str, Any]) -> int:
        """Return how many places of a batch a row takes with these options of `generate`: its beams or sequences."""
        asked = options.get("generation_config") or self.model.generation_config
        counts = [options.get(name) or getattr(asked, name, None) for name in ("num_beams", "num_return_sequences")]
        return max(int(count or 1) for count in counts)

    @contextmanager
    def _finite_steps(self, group: Group, weights: Tensor) -> Iterator[None]:
        """Raise an InputError after the block if logits of a step of `generate` in it were not finite."""
        steps: list[Tensor] = []

        def watch(module: nn.Module, inputs: Any, output: Any) -> None:
            last = output.logits[:, -1:]
            steps.append(peaks(last))
            # The check comes after the last token, and a draw from what is not finite ends a GPU's process.
            last.masked_fill_(~torch.isfinite(steps[-1])[..., None], 0)

        hook = self.model.register_forward_hook(watch)
        try:
            yield
        finally:
            hook.remove()
        if not all_finite(torch.cat(steps)):  # the device is asked once, and not at each token
            for found in steps:
                require_finite_logits(found, group.rows, weights, self.expert_names, self.model.dtype)

    def _require_finite(self, logits: Tensor, mask: Tensor | None, group: Group, weights: Tensor) -> None:
        """Raise an InputError if logits (batch, length, vocabulary) are not finite where a mask is not 0."""
        found = peaks(logits)
        found = found if mask is None else found.masked_fill(mask == 0, 0)
        require_finite_logits(found, group.rows, weights, self.expert_names, self.model.dtype)

    def _asked_tokens(self, options: Mapping[str, Any], length: int) -> tuple[int, int]:
        """Return how many tokens `generate` may add to `length` with these options, and the largest length of both."""
        for name in ("max_new_tokens", "max_length", "num_beams", "num_return_sequences"):
            if name in options:
                require_count(options[name], name)
        config = options.get("generation_config") or self.model.generation_config
        total = options.get("max_length") or getattr(config, "max_length", None) or DEFAULT_LENGTH
        steps = options.get("max_new_tokens") or getattr(config, "max_new_tokens", None)
        if steps is None:
            steps = DEFAULT_LENGTH if total == DEFAULT_LENGTH and "max_length" not in options else total - length
        return int(steps), int(total)

    def _weights_of(
        self, inputs: Mapping[str, Tensor], fusion_weights: Tensor | None, task: str | Sequence[str] | None
    ) -> Tensor:
        """Return the fusion weights of a batch on the CPU: the given ones, or those that `routing` asks for."""
        rows = len(inputs["input_ids"])
        if fusion_weights is not None:
            return self.checked_weights(fusion_weights, rows)
        if self.routing == "router" and self.expert_names:
            return self.simplest(self._routed_batch(inputs).cpu())
        return self.route_all([{}] * rows, None if task is None else tasks_of(task, rows)).cpu()

    def check_tokens(self, ids: Sequence[int], what: str = "context") -> None:
        """Raise an error that names `what` unless `ids` is a list of tokens of the vocabulary, and not empty."""
        require_ids(ids, what, vocabulary_size(self.model.config))


def _contiguous(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Copy the output layer's input if it is a slice.

    On a CPU, torch 2.13 multiplies a slice of a bfloat16 batch's positions a hundred times slower than a copy of it.
    """
    return tuple(argument.contiguous() if isinstance(argument, Tensor) else argument for argument in args)

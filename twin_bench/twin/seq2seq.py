"""TwinSeq2Seq: a twin of encoder-decoders. It runs batches, in which every row has its own fusion weights.

Lists of requests are answered by `twin_bench.twin.seq2seq_requests`, which decides what runs together.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers.modeling_outputs import BaseModelOutput, Seq2SeqLMOutput

from twin_bench.checkpoints.skeleton import position_limit
from twin_bench.data.task import TaskType
from twin_bench.errors import InputError, first_line
from twin_bench.twin.arguments import checked_batch, checked_target
from twin_bench.twin.encoded import Encoded, packed, tokens
from twin_bench.twin.features import Read
from twin_bench.twin.fusion import Fusion
from twin_bench.twin.language import PROBE_BATCH, TwinLanguageModel
from twin_bench.twin.memory import Use
from twin_bench.twin.parts import Parts
from twin_bench.twin.placement import input_device
from twin_bench.twin.plan import Group

START_TOKENS = 1
"""The number of tokens with which a decoder begins its text."""


class TwinSeq2Seq(TwinLanguageModel):
    """A twin of encoder-decoders, such as T5 and BART. What a protocol means for it: TwinLanguageModel.

    The router reads the encoder's hidden states of the *source*. It never sees the target.
    """

    task_type: ClassVar[TaskType] = "seq2seq_lm"

    def _install(self, model: Any, parts: Parts) -> Fusion:
        try:
            _behind_start(model, torch.tensor([[1]], device=input_device(model)))
        except (RuntimeError, TypeError, ValueError) as error:
            raise InputError(
                f"{type(model).__name__}: its config does not say with which token a decoder begins "
                f"({first_line(error)}); add decoder_start_token_id to the base model's config.json"
            ) from None
        output, table = model.get_output_embeddings(), model.get_input_embeddings()
        if output is not None and output.weight is not table.weight:
            # transformers 5 says that every T5 is tied, and lm-eval would have it tie this one.
            model.config.tie_word_embeddings = False
        return super()._install(model, parts)

    @property
    def backbone(self) -> Any:
        """The encoder, whose hidden states the router reads."""
        return self.model.get_encoder()

    @torch.no_grad()
    def features(self, inputs: Mapping[str, Tensor], layers: Sequence[int | Read]) -> list[Tensor]:
        """Return the features that a router on each of `layers` reads: (batch, width), of each source's own tokens.

        Layer 0 is the output of the encoder's embeddings, k that of its block k, and -1 the encoder's own.
        """
        return super().features(_padded_right(inputs), layers)

    @torch.no_grad()
    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        decoder_input_ids: Tensor | None = None,
        labels: Tensor | None = None,
        *,
        fusion_weights: Tensor | None = None,
        task: str | Sequence[str] | None = None,
    ) -> Seq2SeqLMOutput:
        """Run a batch. Each row has its own fusion weights.

        Args:
            input_ids: sources, (batch, length).
            attention_mask: (batch, length), 0 on padding, which may be on either side. None where there is no padding.
            decoder_input_ids: what the decoder reads, (batch, target length), padded on the right.
            labels: the target's tokens in place of `decoder_input_ids`, (batch, target length). The decoder reads them
                moved by one place, behind its start token. Padding is on the right, and may be -100. No loss is
                computed.
            fusion_weights: (batch, experts). None asks the router about the sources.
            task: the task of all rows, or a sequence with each row's. It is used only where `routing` is `task`.

        Returns:
            An output whose `logits` are (batch, target length, vocabulary) in the model's dtype.

        Raises:
            TypeError: an argument that is to be a tensor is none.
            InputError: an empty batch or row, a row over the model's window, a token outside its vocabulary, both or
                none of `decoder_input_ids` and `labels`, inputs or fusion weights of another shape, dtype or range, a
                batch that does not fit into `max_memory`, or logits that are not finite.
        """
        inputs = checked_batch({"input_ids": input_ids, "attention_mask": attention_mask}, self.model)
        target = checked_target(decoder_input_ids, labels, inputs["input_ids"], self.model)
        length = input_ids.shape[1] + target.shape[1]
        self.require_batch(len(input_ids), length, target.shape[1])
        weights = self._weights_of(inputs, fusion_weights, task)
        read = target if labels is None else _behind_start(self.model, target)
        given = {**_padded_right(inputs), "decoder_input_ids": read}
        return Seq2SeqLMOutput(logits=self._grouped_logits(given, weights, length, target.shape[1], None))

    @torch.no_grad()
    def generate(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        *,
        fusion_weights: Tensor | None = None,
        task: str | Sequence[str] | None = None,
        **options: Any,
    ) -> Any:
        """Generate a text from each source of a batch. Each row has its own fusion weights.

        Args:
            input_ids: sources, (batch, length).
            attention_mask: (batch, length), 0 on padding, which may be on either side. None where there is no padding.
            fusion_weights: (batch, experts). None asks the router about the sources.
            task: the task of all rows, or a sequence with each row's. It is used only where `routing` is `task`.
            **options: options of transformers' `generate` (max_new_tokens, do_sample, num_beams, ...). None stands for
                transformers' default.

        Returns:
            What transformers returns: the start token and the text, (batch, 1 + new tokens) int64, unless an option
            asks for another output.

        Raises:
            TypeError: an argument that is to be a tensor is none.
            InputError: an empty batch or source, a source or a text over the model's window, a token outside its
                vocabulary, inputs or fusion weights of another shape, dtype or range, an option that transformers
                refuses, a batch that does not fit into `max_memory`, or logits that are not finite.
        """
        inputs = checked_batch({"input_ids": input_ids, "attention_mask": attention_mask}, self.model)
        options = {name: value for name, value in options.items() if value is not None}
        begun = options.get("decoder_input_ids")
        length = START_TOKENS if begun is None else begun.shape[1]
        steps, total = self._asked_tokens(options, length)
        if steps < 1:
            raise InputError(f"max_length {total}: the decoder begins with {length} tokens; give max_new_tokens")
        self.check_text(steps, length)
        use = Use(steps, sequences=self.sequences(options))
        self.require_batch(len(input_ids), input_ids.shape[1], use=use)
        weights = self._weights_of(inputs, fusion_weights, task)
        return self._generated(inputs, weights, steps, options)

    @torch.no_grad()
    def generate_batch(self, inputs: Mapping[str, Tensor], group: Group, weights: Tensor, **options: Any) -> Any:
        """Run transformers' `generate` on one batch of a plan. The encoder runs once for a row, whatever its beams.

        Args:
            inputs: `input_ids` and `attention_mask` of the sources, (batch, length).
            group: the rows of the batch.
            weights: (N, experts), the fusion weights of the plan, which `group.rows` index.
            **options: options of `generate`. With beams or several sequences a row takes several places.

        Returns:
            What `generate` returns.
        """
        options.setdefault("pad_token_id", self.tokenizer.pad_token_id)
        inputs = _padded_right(inputs)
        with self.fused(group, weights):
            encoded = self.backbone(**inputs)
        group, weights = self._by_sequence(group, weights, options)
        with self.fused(group, weights, steps=True), self._finite_steps(group, weights):
            return self.model.generate(**inputs, encoder_outputs=encoded, **options)

    @torch.no_grad()
    def logits(
        self, sources: Sequence[Sequence[int]], targets: Sequence[Sequence[int]], group: Group, weights: Tensor
    ) -> Tensor:
        """Return the logits of the targets' tokens of one batch of a plan, (batch, longest target, vocabulary).

        The encoder runs once for rows of the same source and weights.

        Args:
            sources: each row's source, none empty. Rows may differ in length.
            targets: each row's target, likewise.
            group: the rows of the batch.
            weights: (N, experts), the fusion weights of the plan, which `group.rows` index.
        """
        first: dict[tuple[Any, ...], int] = {}
        keys = zip(sources, weights[list(group.rows)].tolist(), strict=True)
        places = [first.setdefault((packed(ids), tuple(own)), len(first)) for ids, own in keys]
        encoders = [places.index(place) for place in range(len(first))]
        inputs = self.collate([tokens(sources[row]) for row in encoders])
        with self.fused(group._replace(rows=tuple(group.rows[row] for row in encoders)), weights):
            hidden = self.backbone(**inputs).last_hidden_state
        every = torch.tensor(places, device=self.device)
        longest = max(map(len, targets))
        padding = _padding(self.model)
        padded = [[*target, *[padding] * (longest - len(target))] for target in targets]
        read = _behind_start(self.model, torch.tensor(padded, device=self.device))
        with self.fused(group, weights):
            logits: Tensor = self.model(
                encoder_outputs=BaseModelOutput(last_hidden_state=hidden[every.to(hidden.device)]),
                attention_mask=inputs["attention_mask"][every],
                decoder_input_ids=read,
                use_cache=False,
            ).logits
        self._require_finite(logits, None, group, weights)
        return logits

    def probe(self, encoded: Sequence[Encoded], tasks: Sequence[str], weights: Tensor) -> list[Tensor]:
        """Return the logits of the first token of each row's text: (vocabulary,) each, on the CPU."""
        sources = [row["input_ids"] for row in encoded]
        found: dict[int, Tensor] = {}
        for batch in self.planned(weights, [len(ids) for ids in sources], PROBE_BATCH):
            first = [[int(_padding(self.model) == 0)]] * len(
                batch.rows
            )  # any token but padding: its logits don't read it
            logits = self.logits([sources[row] for row in batch.rows], first, batch, weights)
            found.update(zip(batch.rows, logits[:, 0].cpu(), strict=True))
        return [found[row] for row in range(len(encoded))]

    def check_text(self, steps: int, length: int = START_TOKENS) -> None:
        """Raise an InputError if the decoder's positions end before `length` tokens and `steps` new ones."""
        window = position_limit(self.model.config)
        if window is not None and length + steps > window:
            raise InputError(
                f"{steps} tokens to generate behind {length}; the decoder's window is {window}: give max_new_tokens"
            )


def _padding(model: Any) -> int:
    """Return the token that fills a target. No token before it reads it."""
    return int(model.config.pad_token_id or 0)


def _behind_start(model: Any, target: Tensor) -> Tensor:
    """Return what a decoder reads to give the logits of a target's tokens, (batch, length)."""
    own = getattr(model, "prepare_decoder_input_ids_from_labels", None)
    if own is not None:
        read: Tensor = own(labels=target)
        return read
    start = torch.full_like(target[:, :1], model.config.decoder_start_token_id)
    read = torch.cat([start, target[:, :-1]], dim=1)
    return read.masked_fill(read == -100, _padding(model))


def _padded_right(inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return a batch whose padding is on the right: BART counts positions from the first place on, padding or not."""
    mask = inputs.get("attention_mask")
    if mask is None or bool(mask[:, 0].all()):
        return dict(inputs)
    length = mask.shape[1]
    start = (mask != 0).int().argmax(dim=1, keepdim=True)
    places = (torch.arange(length, device=mask.device) + start) % length
    return {name: tensor.gather(1, places) for name, tensor in inputs.items()}

"""An encoder-decoder's twin as an lm-eval model: what HFLM with its backend seq2seq answers, one request at a time.

The encoder reads the context, and the decoder scores the continuation or generates the text.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from torch import Tensor

from twin_bench.checkpoints.skeleton import position_limit
from twin_bench.data.task import TaskType
from twin_bench.twin.rehearsal import rehearse_targets, rehearse_texts
from twin_bench.twin.requests import Generate, Score, Scored
from twin_bench.twin.sampling import Completion
from twin_bench.twin.seq2seq import START_TOKENS
from twin_bench.twin.seq2seq_requests import generate, score
from twin_bench_lm_eval.language import HFLMDecoding, LanguageTwin, Request


@dataclass(frozen=True, eq=False)
class BeamDecoding(HFLMDecoding):
    """The generation arguments of one request with beams, whose prompt has `prompt` tokens.

    HFLM looks for stop strings behind as many tokens as the prompt has, and in one beam of each prompt of a batch. So
    which beam is the answer can depend on the batch. Here such a request is a batch by itself.
    """

    prompt: int

    @property
    def key(self) -> str:
        """A text that no other request's decoding has."""
        return f"{super().key} {id(self)}"

    def options(self, tokenizer: Any, seeds: Sequence[str], length: int) -> dict[str, Any]:
        """Return the options of transformers' `generate`."""
        return super().options(tokenizer, seeds, self.prompt)


class Seq2SeqTwin(LanguageTwin):
    """A twin of encoder-decoders. Its lists are answered by `twin_bench.twin.seq2seq_requests`.

    Sources are padded on the right. HFLM pads prompts on the left, where BART counts the padding's positions, so its
    texts depend on the batch. They are those of a batch of one here.
    """

    kind: ClassVar[TaskType] = "seq2seq_lm"
    hflm_backend: ClassVar[Literal["causal", "seq2seq"]] = "seq2seq"

    def _window(self, config: Any) -> int | None:
        return position_limit(config)

    def _scores(self, asked: Sequence[Score], **options: Any) -> list[Scored]:
        return score(self.twin, asked, **options)

    def _completions(self, asked: Sequence[Generate], **options: Any) -> list[list[Completion]]:
        return generate(self.twin, asked, **options)

    def _prompt(self, context: str, arguments: dict[str, Any], limit: int) -> tuple[list[int], int]:
        """Return a prompt's tokens, and the number of tokens to generate.

        HFLM adds the prompt's length to max_gen_toks, although the decoder does not read the prompt. The sum, or the
        option `max_length`, counts the start token.
        """
        ids, _ = self.tok_batch_encode([context], left_truncate_len=self.max_length, truncation=self.truncation)
        prompt: list[int] = ids[0].tolist()
        total = int(arguments.pop("max_length", len(prompt) + limit))
        return prompt, min(total, position_limit(self.twin.model.config) or total) - START_TOKENS

    def _decoding(self, until: tuple[str, ...], arguments: Mapping[str, Any], prompt: Sequence[int]) -> HFLMDecoding:
        beams = arguments.get("num_beams") or self.twin.model.generation_config.num_beams or 1
        if int(beams) == 1:
            return HFLMDecoding(until, arguments)
        return BeamDecoding(until, arguments, len(prompt))

    def _model_call(self, inps: Tensor, attn_mask: Tensor | None = None, labels: Tensor | None = None) -> Tensor:
        """Return the logits (batch, target length, vocabulary) of a batch. The router reads each source.

        Args:
            inps: sources, (batch, length).
            attn_mask: (batch, length), 0 on padding.
            labels: targets, (batch, target length), padded on the right.
        """
        logits: Tensor = self.twin(inps, attn_mask, labels=labels, task=self._task).logits
        return logits

    def _model_generate(
        self,
        context: Tensor,
        max_length: int,
        stop: list[str],
        attention_mask: Tensor | None = None,
        **generation_kwargs: Any,
    ) -> Tensor:
        """Generate a batch. The router reads each source.

        Args:
            context: sources (batch, length).
            max_length: the number of tokens of a text, its start token included.
            stop: strings that end a text.
            attention_mask: (batch, length), 0 on padding. By default padding tokens are padding, as in transformers.
            **generation_kwargs: options of transformers' `generate`.
        """
        padding, end = self.tokenizer.pad_token_id, self.tokenizer.eos_token_id
        if attention_mask is None and padding is not None and padding != end:
            attention_mask = context.ne(padding).long()
        decoding = HFLMDecoding(tuple(stop), generation_kwargs)
        options = decoding.options(self.tokenizer, [""] * len(context), context.shape[1])
        texts: Tensor = self.twin.generate(context, attention_mask, task=self._task, max_length=max_length, **options)
        return texts

    def _detect_batch_size(self, requests: Sequence[Request] | None = None, pos: int = 0) -> int:
        """Return the largest batch that fits: of the requests from `pos` on, longest first.

        Without requests the batch is of texts that fill the window, from sources that do.
        """
        if not requests:
            return self._most_rows(lambda rows: rehearse_texts(self.twin, self.max_length, self.max_length, rows))
        longest = [self._score(request) for request in requests[pos : pos + self.max_batch_size]]
        return self._most_rows(lambda rows: rehearse_targets(self.twin, longest, rows, max_length=self.max_length))

    def _texts_that_fit(self, requests: Sequence[Generate], beams: int) -> int:
        """Return the largest batch of texts that fits, for the longest prompt with its text, in as many beams."""
        length = max((len(request.prompt) for request in requests), default=1)
        steps = max((request.max_new_tokens for request in requests), default=1)
        return self._most_rows(lambda rows: rehearse_texts(self.twin, length, steps, rows * beams) // beams)

"""A causal language model's twin as an lm-eval model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, Literal

from lm_eval.models.huggingface import eval_logger
from torch import Tensor

from twin_bench.checkpoints.skeleton import context_window
from twin_bench.data.task import TaskType
from twin_bench.errors import InputError
from twin_bench.twin.compiled import LEAST_STEPS
from twin_bench.twin.rehearsal import rehearse_generation, rehearse_score
from twin_bench.twin.requests import Generate, Score, Scored, generate, score
from twin_bench.twin.sampling import Completion
from twin_bench_lm_eval.language import HFLMDecoding, LanguageTwin, Request


class CausalTwin(LanguageTwin):
    """A twin of causal language models. Its lists are answered by `twin_bench.twin.requests`."""

    kind: ClassVar[TaskType] = "causal_lm"
    hflm_backend: ClassVar[Literal["causal", "seq2seq"]] = "causal"

    def _window(self, config: Any) -> int | None:
        return context_window(config)

    def _loglikelihood_tokens(
        self, requests: Sequence[Request], disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[tuple[float, bool]]:
        """Return (log-likelihood, whether it is the greedy answer) of (key, context, continuation) requests."""
        for _, context, continuation in requests:
            _warn_of_truncation(len(context), len(continuation), self.max_length)
        return super()._loglikelihood_tokens(requests, disable_tqdm, override_bs)

    def _scores(self, asked: Sequence[Score], **options: Any) -> list[Scored]:
        return score(self.twin, asked, **options)

    def _completions(self, asked: Sequence[Generate], **options: Any) -> list[list[Completion]]:
        return generate(self.twin, asked, **options)

    def _prompt(self, context: str, arguments: dict[str, Any], limit: int) -> tuple[list[int], int]:
        """Return a prompt's tokens, and the number of tokens to generate.

        HFLM counts the option `max_length` with the padding of its batch. Here it counts the prompt's own tokens.
        """
        if not context:
            raise InputError("an empty context; nothing to continue or to route on")
        if limit >= self.max_length:
            raise InputError(f"max_gen_toks {limit} leaves no room in a window of {self.max_length}")
        ids, _ = self.tok_batch_encode([context], left_truncate_len=self.max_length - limit, truncation=self.truncation)
        prompt: list[int] = ids[0].tolist()
        return prompt, int(arguments.pop("max_length")) - len(prompt) if "max_length" in arguments else limit

    def _model_call(self, inps: Tensor, attn_mask: Tensor | None = None, labels: Tensor | None = None) -> Tensor:
        """Return the logits (batch, length, vocabulary) of a batch. The router reads each whole row.

        Without `attn_mask` (batch, length) every token counts as the row's own. `labels` are not used.
        """
        logits: Tensor = self.twin(inps, attn_mask, task=self._task).logits
        return logits

    def _model_generate(
        self,
        context: Tensor,
        max_length: int,
        stop: list[str],
        attention_mask: Tensor | None = None,
        **generation_kwargs: Any,
    ) -> Tensor:
        """Generate a batch. The router reads each prompt.

        Args:
            context: prompts (batch, length), padded on the left.
            max_length: the number of tokens of a prompt and its continuation, padding included.
            stop: strings that end a text.
            attention_mask: (batch, length), 0 on padding. By default padding tokens are padding, as in transformers.
            **generation_kwargs: options of transformers' `generate`.
        """
        padding, end = self.tokenizer.pad_token_id, self.tokenizer.eos_token_id
        if attention_mask is None and padding is not None and padding != end:
            attention_mask = context.ne(padding).long()
        decoding = HFLMDecoding(tuple(stop), generation_kwargs)
        options = decoding.options(self.tokenizer, [""] * len(context), context.shape[1])
        return self.twin.generate(context, attention_mask, task=self._task, max_length=max_length, **options)

    def _detect_batch_size(self, requests: Sequence[Request] | None = None, pos: int = 0) -> int:
        """Return the largest batch that fits: of the requests from `pos` on, longest first.

        Without requests the batch is of texts that fill the window.
        """
        if not requests:
            compiled = self.twin.compiles(LEAST_STEPS)
            return self._most_rows(
                lambda rows: rehearse_generation(self.twin, self.max_length, rows, compiled=compiled)
            )
        longest = [self._score(request) for request in requests[pos : pos + self.max_batch_size]]
        return self._most_rows(lambda rows: rehearse_score(self.twin, longest, rows, max_length=self.max_length))

    def _texts_that_fit(self, requests: Sequence[Generate], beams: int) -> int:
        """Return the largest batch of texts that fits, for the longest prompt with its text, in as many beams."""
        length = max((len(request.prompt) + request.max_new_tokens for request in requests), default=1)
        steps = max((request.max_new_tokens for request in requests), default=1)
        compiled = beams == 1 and self.twin.compiles(steps * len(requests))  # in batches there are fewer steps
        return self._most_rows(
            lambda rows: rehearse_generation(self.twin, length, rows * beams, compiled=compiled) // beams
        )


def _warn_of_truncation(context: int, continuation: int, window: int) -> None:
    """Log what HFLM logs of a request that does not fit into the window, in its words."""
    if context + continuation > window + 1:
        eval_logger.warning(
            f"Combined length of context ({context}) and continuation ({continuation}) exceeds model's maximum length "
            f"({window}). Truncating {context + continuation - window + 1} tokens from the left."
        )

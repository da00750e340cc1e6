"""A language model's twin as an lm-eval model: HFLM, with every request answered by its own fused weights."""

from __future__ import annotations

import importlib.metadata
import inspect
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from lm_eval.models.huggingface import HFLM
from lm_eval.models.utils import normalize_gen_kwargs
from torch import Tensor
from tqdm import tqdm  # type: ignore[import-untyped]
from transformers import PreTrainedModel

from twin_bench.checkpoints.dtypes import known_dtype
from twin_bench.checkpoints.skeleton import context_window, read_config
from twin_bench.errors import InputError, nearest
from twin_bench.twin.cache import named_directory
from twin_bench.twin.causal import TwinCausalLM, tokens
from twin_bench.twin.directory import load_parts
from twin_bench.twin.parts import PROTOCOLS, ProtocolName
from twin_bench.twin.plan import plan
from twin_bench_lm_eval.model import TwinMerged, positive, usable

REFUSED = (
    *("peft", "delta", "autogptq", "gptqmodel", "gguf_file", "revision", "subfolder", "tokenizer"),
    *("parallelize", "tp_plan", "softmax_dtype", "mixed_precision_dtype"),
)
"""HFLM's arguments for other checkpoints, for one model on several devices (a twin's layers are on one), or for
precisions beside `dtype`: log-softmax is taken in float32 in any case."""
CPU_BATCH = 16
"""What batch_size=auto is on a CPU, where there is no memory limit to find."""

Request = tuple[Any, list[int], list[int]]


class CausalTwin(TwinMerged, HFLM):  # type: ignore[misc]
    """Serves any lm-eval task that HFLM serves, whose options it takes.

    The router reads a request's context, as the model reads it: not the continuation that is scored, nor
    padding. All requests of a list are routed first, equal contexts once; then grouped by their weights,
    fused once a group, and answered in the order asked. `loglikelihood_rolling` has no context: the prefix
    token is routed on, so that one set of weights scores a whole document.
    """

    def __init__(
        self,
        pretrained: str | Path | None = None,
        *,
        twin: TwinCausalLM | None = None,
        task: str | None = None,
        device: str | None = None,
        batch_size: int | str | None = 1,
        protocol: ProtocolName = "standard",
        tolerance: float | None = None,
        fusion: str = "exact",
        data: str | Path | None = None,
        split: str | None = None,
        shots: int | None = None,
        **options: Any,
    ) -> None:
        """Load a twin directory, or serve a twin that is loaded already.

        Args:
            pretrained: the twin's directory, or
            twin: the twin itself, with its own protocol, device and dtype.
            task: the task of all requests, where the twin's routing is `task`.
            device: where it runs; the CPU in place of a CUDA device that is not there.
            batch_size: requests a forward; `auto` is the largest that fits a GPU, and 16 on a CPU.
            protocol: standard (the default), paper or routed: see the README.
            tolerance: of the logits, relative to their size; by default 0 in float32: see the README.
            fusion: exact, the only mode.
            data: not used here but by this project's tasks, as are `split` and `shots`: where their rows are.
            split: which rows.
            shots: how many few-shot examples a prompt has.
            **options: HFLM's own (dtype, max_length, add_bos_token, ...).

        Raises:
            InputError: an unknown argument, a value it can't have, or whatever is wrong with the twin.
        """
        known = inspect.signature(HFLM.__init__).parameters.keys() - {"self", "kwargs"}
        for name in options:
            if name in REFUSED and options[name]:
                raise InputError(f"twin_merged: {name} is HFLM's, and a twin can't take it; leave it out")
            if name not in known:
                mine = inspect.signature(CausalTwin.__init__).parameters.keys() - {"self", "twin", "task", "options"}
                raise InputError(f"twin_merged: unknown argument {name!r}{nearest(name, known - {*REFUSED} | mine)}")
        if fusion != "exact":
            raise InputError(f"twin_merged: fusion={fusion}; known: exact")
        if protocol not in PROTOCOLS:
            raise InputError(f"twin_merged: protocol={protocol}{nearest(protocol, PROTOCOLS)}")
        if not str(batch_size).startswith("auto"):
            positive("batch_size", batch_size)
        self._task, self._protocol, self._tolerance = task, protocol, tolerance
        self._routed: dict[tuple[int, ...], Tensor] = {}
        self._detected: int | None = None
        if twin is None:
            if pretrained is None:
                raise InputError("twin_merged: name a twin directory: pretrained=MY_TWIN")
            self._directory = Path(str(pretrained))
            self._parts = load_parts(self._directory, trust_remote_code=bool(options.get("trust_remote_code")))
            options["dtype"] = known_dtype(options.get("dtype")) or "auto"
            options["max_length"] = self._window(options.get("max_length") or self._parts.max_length)
            given = {"device": usable(device) or "cpu", "batch_size": batch_size}
            super().__init__(pretrained=str(self._directory / "model"), **given, **options)
        else:
            self.twin = twin
            super().__init__(pretrained=twin.model, tokenizer=twin.tokenizer, batch_size=batch_size, **options)
        self.twin.tokenizer = self.tokenizer

    def _window(self, max_length: Any) -> int | None:
        """Return the tokens of an input asked for, None for the model's window; InputError for more than that."""
        if max_length is None:
            return None
        window = context_window(read_config(self._directory / "model"))
        if positive("max_length", max_length) > window:
            raise InputError(f"twin_merged: max_length={max_length}; the model's window is {window}")
        return int(max_length)

    def _create_model(self, pretrained: str, **options: Any) -> None:
        super()._create_model(pretrained, **options)
        model: PreTrainedModel = self._model
        self.twin = TwinCausalLM(model, self.tokenizer, self._parts, protocol=self._protocol, tolerance=self._tolerance)
        self.twin.feature_cache = named_directory()
        self.twin.to(self._device)

    def _loglikelihood_tokens(
        self, requests: Sequence[Request], disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[tuple[float, bool]]:
        """Return (log-likelihood, whether it is the greedy answer) of (key, context, continuation) requests."""
        rolling = [self.prefix_token_id]
        with tqdm(total=len(requests), disable=disable_tqdm or self.rank != 0, desc="Running the twin") as bar:
            scores = self.twin.log_likelihoods(
                [(context, continuation) for _, context, continuation in requests],
                routed_on=[rolling if key is None else context for key, context, _ in requests],
                tasks=self._tasks(len(requests)),
                batch_size=override_bs or self._rows_a_batch(),
                max_length=self.max_length,
                progress=bar.update,
            )
        return [(float(score.log_probs.sum()), score.greedy) for score in scores]

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """Return the texts generated, as HFLM does, prompts with equal weights together."""
        prompts, steps = [], 0
        for request in requests:
            context, given = request.args
            if not context:
                raise InputError(f"task {request.task_name!r}: an empty context; nothing to continue or to route on")
            limit = normalize_gen_kwargs(given, self.max_gen_toks)["max_gen_toks"]
            if limit >= self.max_length:
                raise InputError(
                    f"task {request.task_name!r}: max_gen_toks {limit} leaves no room in a window of {self.max_length}"
                )
            ids, _ = self.tok_batch_encode(
                [context], left_truncate_len=self.max_length - limit, truncation=self.truncation
            )
            prompts.append(tuple(ids[0].tolist()))
            steps = max(steps, limit)
        weights = self.twin.route_all(
            [tokens(ids) for ids in prompts], self._tasks(len(prompts)), batch_size=self._rows_a_batch()
        )
        self._routed = dict(zip(prompts, weights, strict=True))
        answers: dict[int, str] = {}
        lengths = [len(ids) for ids in prompts]
        groups = plan(weights, lengths, self.twin.costs, steps=steps, batch_size=self._rows_a_batch())
        for group in groups:
            texts = super().generate_until([requests[row] for row in group.rows], disable_tqdm=disable_tqdm)
            answers.update(zip(group.rows, texts, strict=True))
        return [answers[row] for row in range(len(requests))]

    def _model_generate(self, context: Tensor, max_length: int, stop: list[str], **options: Any) -> Tensor:
        """Generate a batch with the weights of its own prompts."""
        mask: Tensor = options["attention_mask"]
        prompts = [tuple(ids[kept.bool()].tolist()) for ids, kept in zip(context, mask, strict=True)]
        weights = torch.stack([self._routed[ids] for ids in prompts])
        with self.twin.generating(weights, context.shape[1], max_length - context.shape[1], options):
            generated: Tensor = super()._model_generate(context, max_length, stop, **options)
        return generated

    def tok_batch_encode(
        self,
        strings: list[str],
        padding_side: str = "left",
        left_truncate_len: int | None = None,
        truncation: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """Encode each string as it would be alone: HFLM adds special tokens by what the batch's first begins with."""
        encode = super().tok_batch_encode
        rows = [encode([string], padding_side, left_truncate_len, truncation)[0][0].tolist() for string in strings]
        padded = self.tokenizer.pad({"input_ids": rows}, padding_side=padding_side, return_tensors="pt")
        return padded["input_ids"], padded["attention_mask"]

    def _detect_batch_size(self, requests: Sequence[Any] | None = None, pos: int = 0) -> int:
        """Return the largest batch that fits, found once: every process must look for it equally often."""
        if self._detected is None:
            self._detected = CPU_BATCH if self.device.type == "cpu" else super()._detect_batch_size()
        return self._detected

    def _rows_a_batch(self) -> int:
        return self._detect_batch_size() if self.batch_size == "auto" else int(self.batch_size)

    def _tasks(self, rows: int) -> list[str] | None:
        return None if self._task is None else [self._task] * rows

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """Return the tokenizer's chat template; InputError where one is asked for and there is none."""
        if chat_template and not self.tokenizer.chat_template:
            raise InputError(
                "twin_merged: this model's tokenizer has no chat template; leave out --apply_chat_template"
            )
        chosen: str | None = super().chat_template(chat_template)
        return chosen

    def get_model_info(self) -> dict[str, Any]:
        """Return what lm-eval writes into the results' config: what the scores depend on."""
        return {
            "model_num_parameters": self.twin.model.num_parameters(),
            "model_dtype": str(self.twin.model.dtype),
            "twin_bench_version": importlib.metadata.version("twin-bench"),
            "protocol": self.twin.protocol,
            "tolerance": self.twin.tolerance,
            "sensitivity": self.twin.sensitivity,
            "routing": self.twin.routing,
            "fusion": "exact",
            "max_length": self.max_length,
            "digests": dict(self.twin.digests),
        }

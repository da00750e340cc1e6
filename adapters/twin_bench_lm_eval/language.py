"""What the twins of language models have in common as lm-eval models: HFLM whose requests have their own weights."""

from __future__ import annotations

import abc
import inspect
import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from accelerate import find_executable_batch_size
from lm_eval.models.huggingface import HFLM
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs, postprocess_generated_text
from lm_eval.models.utils_hf import clear_torch_cache, stop_sequences_criteria
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from tqdm import tqdm  # type: ignore[import-untyped]
from transformers import PreTrainedModel

from twin_bench.checkpoints.dtypes import known_dtype
from twin_bench.checkpoints.quantization import asked_of, bits_of, config_keys
from twin_bench.checkpoints.skeleton import read_config
from twin_bench.data.task import TaskType
from twin_bench.errors import InputError, first_line
from twin_bench.protocols import ProtocolName
from twin_bench.twin.cache import named_directory
from twin_bench.twin.directory import load_parts, read_manifest
from twin_bench.twin.language import TwinLanguageModel
from twin_bench.twin.model import twin_class
from twin_bench.twin.placement import Devices, find_placement, offloading
from twin_bench.twin.requests import Generate, Score, Scored
from twin_bench.twin.sampling import Completion, Decoding
from twin_bench_lm_eval.arguments import checked, loading, require_settings
from twin_bench_lm_eval.base import ServedTwin, memory, positive, provenance, usable

CPU_BATCH = 16
"""The meaning of batch_size=auto on a CPU, which has no memory limit to find."""

Request = tuple[Any, list[int], list[int]]


@dataclass(frozen=True, eq=False)
class HFLMDecoding(Decoding):
    """The generation arguments of some requests, applied as HFLM applies them.

    `until` are the strings that end a text. `arguments` are the other ones: options of transformers' `generate`.
    """

    until: tuple[str, ...]
    arguments: Mapping[str, Any]

    @property
    def key(self) -> str:
        """A text that is equal for requests that may share a batch."""
        return repr((self.until, sorted(self.arguments.items())))

    def options(self, tokenizer: Any, seeds: Sequence[str], length: int) -> dict[str, Any]:
        """Return the options of transformers' `generate` for one batch. The seeds are not used, as in HFLM."""
        options = {"use_cache": True, **self.arguments}
        temperature = options.setdefault("temperature", 0.0)
        if temperature == 0.0 and options.get("do_sample") is None:
            options["do_sample"] = False
        if temperature == 0.0 and options["do_sample"] is False:
            del options["temperature"]
        criteria = stop_sequences_criteria(tokenizer, list(self.until), length, len(seeds))
        return {**options, "stopping_criteria": criteria}


class LanguageTwin(ServedTwin, HFLM):  # type: ignore[misc]
    """Serves any lm-eval task that HFLM serves, and takes HFLM's options: a CausalTwin or a Seq2SeqTwin.

    The router reads a request's context. It does not read the continuation that is scored, or padding. A list of
    requests is answered as a whole. `loglikelihood_rolling` has no context, so the router reads the prefix token, and
    one set of weights scores a whole document.

    A subclass names the kind of twin and HFLM's name for it, its `backend`.
    """

    kind: ClassVar[TaskType]
    hflm_backend: ClassVar[Literal["causal", "seq2seq"]]

    def __init__(
        self,
        pretrained: str | Path | None = None,
        *,
        twin: TwinLanguageModel | None = None,
        task: str | None = None,
        device: str | None = None,
        batch_size: int | str | None = 1,
        protocol: ProtocolName = "standard",
        tolerance: float | None = None,
        compile: str | None = None,
        fusion: str = "exact",
        data: str | Path | None = None,
        split: str | None = None,
        shots: int | None = None,
        quantization: str | Mapping[str, Any] | None = None,
        max_memory: int | str | None = None,
        **options: Any,
    ) -> None:
        """Load a twin directory, or serve a twin in memory.

        Args:
            pretrained: the twin's directory.
            twin: a twin in memory, in place of `pretrained`. It keeps its own protocol, device and dtype.
            task: the task of all requests. It is needed only where the twin's routing is `task`.
            device: by default (or `auto`) cuda, else mps, else cpu. The CPU replaces a CUDA device that is not there.
                `parallelize=True` and `device_map` take several devices.
            batch_size: the largest number of rows in a forward. `auto` finds what fits a GPU, and is 16 on a CPU.
            protocol: standard (the default), paper or routed: see docs/protocols.md.
            tolerance: the allowed relative error of the logits; by default 6e-8 in float32: see docs/protocols.md.
            compile: when the steps of a text are compiled: auto (on CUDA, for many steps), on, or off, the default.
            fusion: exact is the only mode.
            data: where this project's tasks find their rows. The model does not use it.
            split: the split of those rows. The model does not use it.
            shots: the number of few-shot examples in those tasks' prompts. The model does not use it.
            quantization: keep the shared expert in 4bit or 8bit, or as keys of transformers' BitsAndBytesConfig say.
            max_memory: the most memory of its device that the twin and its batches take, such as 40GB: docs/gpu.md.
            **options: HFLM's own (dtype, max_length, ...), and those that it passes on (attn_implementation, ...).

        Raises:
            InputError: an unknown argument, a wrong value, or a twin that can't be loaded.
        """
        require_settings(fusion=fusion, protocol=protocol, compile=compile or "off", batch_size=batch_size)
        self._task, self._protocol, self._tolerance = task, protocol, tolerance
        limit = memory(max_memory, several=bool(options.get("parallelize") or options.get("device_map")))
        self._loading: dict[str, Any] = {}
        self._used: list[tuple[float, ...]] = []  # the fusion weights of the last list of log-likelihoods
        if twin is None:
            self._load(pretrained, device, batch_size, quantization, options)
        elif quantization is not None:
            raise InputError("twin_merged: quantization is decided when a twin is loaded; give it to from_pretrained")
        else:
            self.twin: Any = twin
            given = {"pretrained": twin.model, "tokenizer": twin.tokenizer, "batch_size": batch_size}
            super().__init__(**given, **self._taken(options, twin.model.config))
        self.twin.tokenizer = self.tokenizer
        self.twin.compiling = compile or self.twin.compiling
        self.twin.limit_memory(limit or self.twin.max_memory)

    def _load(
        self,
        pretrained: str | Path | None,
        device: str | None,
        batch_size: int | str | None,
        quantization: str | Mapping[str, Any] | None,
        options: dict[str, Any],
    ) -> None:
        """Have HFLM load the shared expert and its tokenizer. `_create_model` then adds the experts and the router."""
        if pretrained is None:
            raise InputError("twin_merged: name a twin directory: pretrained=MY_TWIN")
        directory = Path(str(pretrained))
        read_manifest(directory)
        trusted = bool(options.get("trust_remote_code"))
        config = read_config(directory / "model", trust_remote_code=trusted)
        options = self._taken(options, config)
        self._loading = loading(options)
        self._parts = load_parts(directory, trust_remote_code=trusted)
        self._dtype = known_dtype(options.get("dtype"))
        options["dtype"] = self._dtype or "auto"
        self._quantised = asked_of(directory / "model", config, self.kind, quantization, self._dtype)
        self._spread = bool(options.get("parallelize")) or options.get("device_map") is not None
        options["parallelize"] = self._spread
        options["max_length"] = self._checked_window(options.get("max_length") or self._parts.max_length, config)
        super().__init__(pretrained=str(directory / "model"), device=usable(device), batch_size=batch_size, **options)

    def _taken(self, options: Mapping[str, Any], config: Any) -> dict[str, Any]:
        """Return the options that HFLM is given. InputError for one that can't hold, or an unknown one."""
        own = inspect.signature(LanguageTwin.__init__).parameters.keys() - {"self", "twin", "task", "options"}
        return {**checked(options, config, own, self.hflm_backend), "backend": self.hflm_backend}

    def _checked_window(self, max_length: Any, config: Any) -> int | None:
        """Return the number of tokens to which an input is cut, None for HFLM's own. InputError if it is too large."""
        if max_length is None:
            return None
        window = self._window(config)
        if positive("max_length", max_length) > (window or int(max_length)):
            raise InputError(f"twin_merged: max_length={max_length}; the model's window is {window}")
        return int(max_length)

    @abc.abstractmethod
    def _window(self, config: Any) -> int | None:
        """Return the largest number of tokens of an input, None if there is none."""

    @abc.abstractmethod
    def _scores(self, asked: Sequence[Score], **options: Any) -> list[Scored]:
        """Return the answer to each request for a log-likelihood, by the twin's scheduler."""

    @abc.abstractmethod
    def _completions(self, asked: Sequence[Generate], **options: Any) -> list[list[Completion]]:
        """Return the answer to each request for a text, by the twin's scheduler."""

    @abc.abstractmethod
    def _prompt(self, context: str, arguments: dict[str, Any], limit: int) -> tuple[list[int], int]:
        """Return a prompt's tokens, and the number of tokens to generate, as HFLM counts it.

        Args:
            context: the prompt.
            arguments: options of transformers' `generate`. `max_length` is taken out.
            limit: the task's max_gen_toks.
        """

    @abc.abstractmethod
    def _texts_that_fit(self, requests: Sequence[Generate], beams: int) -> int:
        """Return the largest batch of texts that fits, for the longest prompt with its text, in as many beams."""

    def _create_model(self, pretrained: str, **options: Any) -> None:
        options["quantization_config"] = self._quantised or options.get("quantization_config")
        self._bits = bits_of(options["quantization_config"])
        try:
            with offloading(options.get("offload_folder") if self._spread else None):
                super()._create_model(pretrained, **options)
        except InputError:
            raise
        except (ImportError, RuntimeError, TypeError, ValueError) as error:
            if not self._loading:
                raise
            given = ",".join(f"{name}={value}" for name, value in self._loading.items())
            raise InputError(f"twin_merged: the model can't be loaded with {given}: {first_line(error)}") from error
        model: PreTrainedModel = self._model
        chosen: Any = {"protocol": self._protocol, "tolerance": self._tolerance}
        self.twin = twin_class(self.kind)(model, self.tokenizer, self._parts, **chosen)
        self.twin.feature_cache = named_directory()
        if self._spread:
            self._device = self.twin.device
        else:
            self.twin.to(self._device)

    def _get_accelerate_args(self, *args: Any, **options: Any) -> dict[str, Any]:
        """Return what HFLM tells transformers of devices. What the experts add counts in a planned map."""
        found: dict[str, Any] = super()._get_accelerate_args(*args, **options)
        if found.get("max_memory") is None:  # one device
            return found
        devices = Devices(found["device_map"], found["max_memory"] or None, found["offload_folder"])
        placement = find_placement(
            devices, self._config, self.kind, self._parts.exclusive, self._dtype, bits=self._bits
        )
        self._parts = replace(self._parts, copies=placement.copies)
        return {"device_map": placement.device_map, "offload_folder": found["offload_folder"]}

    @property
    def _quantised_as(self) -> str | None:
        return config_keys(self.twin.model.config)

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Return (log-likelihood, whether it is the greedy answer) of (context, continuation) requests."""
        answers: list[tuple[float, bool]] = super().loglikelihood(requests, disable_tqdm)
        self.keep(requests, self._used)
        return answers

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        """Return each document's log-likelihood. The windows of all documents are answered as one list."""
        windows: list[Request] = []
        counts: list[int] = []
        for request in requests:
            (document,) = request.args
            rolled = get_rolling_token_windows(
                self.tok_encode(document), self.prefix_token_id, max_seq_len=self.max_length, context_len=1
            )
            own = [(None, *make_disjoint_window(window)) for window in rolled]
            windows += own
            counts.append(len(own))
        answers = iter(self._loglikelihood_tokens(windows, disable_tqdm))
        starts = itertools.accumulate([0, *counts[:-1]])
        self.keep(requests, (self._used[start] if count else () for start, count in zip(starts, counts, strict=True)))
        return [sum(answer for answer, _ in itertools.islice(answers, count)) for count in counts]

    def _loglikelihood_tokens(
        self, requests: Sequence[Request], disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[tuple[float, bool]]:
        """Return (log-likelihood, whether it is the greedy answer) of (key, context, continuation) requests."""
        asked = [self._score(request) for request in requests]
        batch_size = override_bs or self._rows_a_batch(lambda: self._detect_batch_size(longest_first(requests)))
        with self._bar(len(requests), disable_tqdm) as bar, self.timed():
            scores = self._scores(asked, batch_size=batch_size, max_length=self.max_length, progress=bar.update)
        self._used = [one.weights for one in scores]
        return [(float(one.log_probs.sum()), one.greedy) for one in scores]

    def _score(self, request: Request) -> Score:
        key, context, continuation = request
        return Score(context, continuation, [self.prefix_token_id] if key is None else context, self._task)

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """Return the generated texts, in order: those that HFLM generates with each prompt's own fused model."""
        decodings: dict[str, HFLMDecoding] = {}
        asked, ends = [], []
        for request in requests:
            prompt, decoding, limit = self._translated(request)
            decoding = decodings.setdefault(decoding.key, decoding)
            asked.append(Generate(prompt, limit, decoding, task=self._task))
            ends.append(decoding.until)
        beams = max((int(one.arguments.get("num_beams") or 1) for one in decodings.values()), default=1)
        batch_size = self._rows_a_batch(lambda: self._texts_that_fit(asked, beams))
        with self._bar(len(requests), disable_tqdm) as bar, self.timed():
            answers = self._completions(
                asked, batch_size=batch_size, max_length=self.max_length, log_probs=False, progress=bar.update
            )
        self.keep(requests, (found.weights for (found,) in answers))
        return [self._text(found, until) for (found,), until in zip(answers, ends, strict=True)]

    def _bar(self, requests: int, disabled: bool) -> Any:
        """Return the bar of a request list. Each request takes two steps: it is routed, and it is answered."""
        return tqdm(total=2 * requests, disable=disabled or self.rank != 0, desc="Running the twin", unit="step")

    def _translated(self, request: Any) -> tuple[list[int], HFLMDecoding, int]:
        """Return a request's prompt, how to decode, and the number of tokens to generate, as HFLM reads them."""
        context, given = request.args
        task = request.task_name
        arguments: dict[str, Any] = dict(normalize_gen_kwargs(given, self.max_gen_toks))
        end = self.tok_decode(self.eot_token_id, skip_special_tokens=False)
        until = tuple(handle_stop_sequences(arguments.pop("until", None), eos=end))
        limit = int(arguments.pop("max_gen_toks"))
        if int(arguments.get("num_return_sequences") or 1) > 1:
            raise InputError(f"task {task!r}: num_return_sequences: lm-eval takes one text a request; leave it out")
        try:
            prompt, limit = self._prompt(context, arguments, limit)
        except InputError as error:
            raise InputError(f"task {task!r}: {error}") from None
        return prompt, self._decoding(until, arguments, prompt), limit

    def _decoding(self, until: tuple[str, ...], arguments: Mapping[str, Any], prompt: Sequence[int]) -> HFLMDecoding:
        return HFLMDecoding(until, arguments)

    def _text(self, found: Completion, until: Sequence[str]) -> str:
        """Return a completion as text, cut where HFLM cuts it."""
        ids = found.tokens if found.end_token is None else [*found.tokens, found.end_token]
        think_end = self.think_end_token
        if isinstance(think_end, int) and think_end in ids:
            ids = ids[len(ids) - ids[::-1].index(think_end) :]
        text = self.tok_decode(ids)
        if isinstance(think_end, int):
            text = text.lstrip()
        cut: str = postprocess_generated_text(text, list(until), think_end if isinstance(think_end, str) else None)
        return cut

    def _most_rows(self, rehearse: Callable[[int], int]) -> int:
        """Return the largest number of rows, `max_batch_size` at most, for which `rehearse` does not run out of memory.

        `rehearse` returns how many rows it ran at once. They are fewer where a plan cuts such a batch to what memory
        holds. lm-eval prints and stores that number. A plan of shorter rows may fill the one that is returned.

        Both are the least of all processes' numbers. So all must ask equally often: once for each request list.
        """
        found = fits = CPU_BATCH

        def rehearsed(rows: int) -> tuple[int, int]:
            return rows, rehearse(rows)

        if self.device.type != "cpu":
            try:
                found, fits = find_executable_batch_size(rehearsed, starting_batch_size=self.max_batch_size)()
            except RuntimeError as error:
                if "No executable batch size found" not in str(error):
                    raise
                found = fits = 1
        if self.world_size > 1:
            every = self.all_gather(torch.tensor([[found, fits]], device=self.device))
            found, fits = every.reshape(-1, 2).amin(dim=0).tolist()
        clear_torch_cache()
        self.batch_sizes[len(self.batch_sizes)] = fits
        return found

    def _rows_a_batch(self, detect: Callable[[], int]) -> int:
        return detect() if self.batch_size == "auto" else int(self.batch_size)

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """Return the tokenizer's chat template. Raise an InputError if one is asked for and there is none."""
        if chat_template and not self.tokenizer.chat_template:
            raise InputError(
                "twin_merged: this model's tokenizer has no chat template; leave out --apply_chat_template"
            )
        chosen: str | None = super().chat_template(chat_template)
        return chosen

    def get_model_info(self) -> dict[str, Any]:
        """Return what lm-eval writes into the results' config: everything that the scores depend on."""
        return {
            "model_num_parameters": self.twin.model.num_parameters(),
            "model_dtype": str(self.twin.model.dtype),
            **provenance(self.twin),
            "tolerance": self.twin.tolerance,
            "sensitivity": self.twin.sensitivity,
            "routing": self.twin.routing,
            "fusion": "exact",
            **({} if self._quantised_as is None else {"quantization": self._quantised_as}),
            "max_length": self.max_length,
            "loaded_with": {name: str(value) for name, value in self._loading.items() if name != "token"},
            "digests": dict(self.twin.digests),
        }


def longest_first(requests: Sequence[Request]) -> list[Request]:
    """Return requests, the one with the most tokens first."""
    return sorted(requests, key=lambda request: -len(request[1]) - len(request[2]))

"""A classifier's twin as an lm-eval model: an answer is a label, and its likelihood is the head's probability."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm  # type: ignore[import-untyped]

from twin_bench.data.task import TaskInput, joined
from twin_bench.errors import InputError, nearest
from twin_bench.twin.cache import named_directory
from twin_bench.twin.classifier import Prediction, TwinClassifier
from twin_bench_lm_eval.base import Request, ServedTwin, memory, places, positive, provenance


class ClassifierTwin(ServedTwin):
    """Serves the tasks in tasks/glue. Their rows hold the text to read and the task whose head answers.

    The text comes from the row (`doc["text"]`, `doc["text_pair"]`), so that a pair is encoded as a pair. The context
    string shows the same text. One call of the twin answers all inputs of a request list. Each distinct input is
    answered once. The answers do not depend on the order of the requests.
    """

    def __init__(
        self,
        pretrained: str | Path | None = None,
        *,
        twin: TwinClassifier | None = None,
        device: str | None = None,
        dtype: str | torch.dtype | None = None,
        batch_size: int | str = "auto",
        max_batch_size: int | None = None,
        max_length: int | None = None,
        protocol: str | None = None,
        tolerance: float | None = None,
        fusion: str = "exact",
        data: str | Path | None = None,
        split: str | None = None,
        trust_remote_code: bool = False,
        max_memory: int | str | None = None,
        **spread: Any,
    ) -> None:
        """Load a twin directory, or serve a twin in memory.

        Args:
            pretrained: the twin's directory.
            twin: a twin in memory, in place of `pretrained`. It keeps its own protocol, device and dtype.
            device: by default (or `auto`) cuda, else mps, else cpu. The CPU replaces a CUDA device that is not there.
            dtype: a torch dtype or its name; by default (or `auto`) that of the shared expert.
            batch_size: the largest number of inputs in a forward. `auto` is 32.
            max_batch_size: an argument of lm-eval's. It is not used.
            max_length: the number of tokens to which an input is truncated; by default what the twin was built with.
            protocol: standard (the default), paper or routed: see docs/protocols.md.
            tolerance: the allowed relative error of the logits; by default 6e-8 in float32: see docs/protocols.md.
            fusion: exact is the only mode.
            data: where the tasks find their rows. The model does not use it.
            split: the split of those rows. The model does not use it.
            trust_remote_code: let transformers run code that comes with the shared expert.
            max_memory: the most memory of its device that the twin and its batches take, such as 40GB: docs/gpu.md.
            **spread: HFLM's arguments of several devices (see `places`). Any other argument is an error.

        Raises:
            InputError: an unknown argument, a wrong value, or a twin that can't be loaded.
        """
        super().__init__()
        several = inspect.signature(places).parameters.keys() - {"device"}
        for name in spread.keys() - several:
            known = inspect.signature(ClassifierTwin).parameters.keys() - {"spread", "twin"} | several
            raise InputError(f"twin_merged: unknown argument {name!r}{nearest(name, known)}")
        if fusion != "exact":
            raise InputError(f"twin_merged: fusion={fusion}; known: exact")
        self.batch_size = 32 if str(batch_size).startswith("auto") else positive("batch_size", batch_size)
        limit = memory(max_memory, several=any(spread.values()))
        if twin is None:
            chosen: Any = {"protocol": protocol or "standard", "tolerance": tolerance, **places(device, **spread)}
            twin = _loaded(pretrained, dtype, trust_remote_code=trust_remote_code, **chosen)
        if protocol not in (None, twin.protocol):
            raise InputError(f"twin_merged: protocol={protocol}, but the twin was loaded for {twin.protocol}")
        self.twin = twin
        if limit is not None:
            twin.limit_memory(limit)
        self.max_length = twin.max_length if max_length is None else positive("max_length", max_length)
        self.tokenizer = twin.tokenizer

    def loglikelihood(self, requests: Sequence[Request]) -> list[tuple[float, bool]]:
        """Return, for each (context, label id), the label's log-probability and whether it is the most probable one.

        Log-probabilities are the head's log-softmax. Under `routed` the head of another task may answer. A label that
        this head does not have gets -inf.
        """
        labels = [self._label(request) for request in requests]
        results = []
        for label, prediction in zip(labels, self._answer(requests), strict=True):
            if self._is_regression(prediction.head) or label >= len(prediction.logits):
                results.append((-torch.inf, False))
            else:
                log_probability = float(prediction.logits.log_softmax(dim=0)[label])
                results.append((log_probability, label == int(prediction.logits.argmax())))
        return results

    def generate_until(self, requests: Sequence[Request]) -> list[str]:
        """Return the regression head's number as text.

        Under `routed` a classification head may answer. Its text is the number of the most probable class.
        """
        for request in requests:
            if not self._is_regression(self._input(request).task):
                raise InputError(f"task {request.task_name!r}: a classifier twin does not generate text")
        return [
            repr(float(prediction.logits[0]))
            if self._is_regression(prediction.head)
            else str(int(prediction.logits.argmax()))
            for prediction in self._answer(requests)
        ]

    def loglikelihood_rolling(self, requests: Sequence[Request]) -> list[float]:
        """Raise an InputError: a classifier does not generate text."""
        raise InputError(f"task {requests[0].task_name!r}: a classifier twin does not generate text")

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """Raise an InputError: a classifier has no chat template."""
        raise InputError("twin_merged: a classifier twin has no chat template; leave out --apply_chat_template")

    def get_model_info(self) -> dict[str, Any]:
        """Return what lm-eval writes into the results' config: everything that the scores depend on."""
        return {
            **provenance(self.twin),
            "tolerance": self.twin.tolerance,
            "fusion": "exact",
            "max_length": self.max_length,
            "digests": dict(self.twin.digests),
        }

    def _answer(self, requests: Sequence[Request]) -> list[Prediction]:
        inputs = [self._input(request) for request in requests]
        # They are sorted, so that not even the last bit of an answer depends on the order of the requests.
        distinct = sorted(set(inputs), key=lambda row: (row.task, row.text, row.text_pair or ""))
        steps = 2 * len(distinct)  # routed, answered
        with tqdm(total=steps, desc="Running the twin", unit="step", disable=None) as bar, self.timed():
            predictions = self.twin.classify(
                [(row.text, row.text_pair) for row in distinct],
                [row.task for row in distinct],
                batch_size=self.batch_size,
                max_length=self.max_length,
                progress=bar.update,
            )
        by_input = dict(zip(distinct, predictions, strict=True))
        answers = [by_input[row] for row in inputs]
        self.keep(requests, (answer.weights for answer in answers))
        return answers

    def _input(self, request: Request) -> TaskInput:
        """Return the text and the task of a request. Raise an InputError if its row does not name them."""
        name, doc = request.task_name, request.doc
        heads = ", ".join(self.twin.num_labels)
        if "task" not in doc or "text" not in doc:
            raise InputError(
                f"task {name!r}: its rows do not say which expert's head is asked (experts: {heads}); "
                'a classifier twin serves the tasks twin_*: --include_path "$(twin-bench tasks)"'
            )
        row = TaskInput(doc["text"], doc.get("text_pair"), doc["task"])
        if row.task not in self.twin.num_labels:
            raise InputError(f"task {name!r}: the twin has no expert for {row.task!r}; its experts: {heads}")
        if request.args[0] != joined(row.text, row.text_pair):
            raise InputError(
                f"task {name!r}: a classifier reads the row's own text and nothing else; "
                "leave out examples (--num_fewshot), system instructions and chat templates"
            )
        return row

    def _label(self, request: Request) -> int:
        task = self._input(request).task
        if self._is_regression(task):
            raise InputError(f"task {request.task_name!r}: {task} has a number as its answer, not labels")
        answer = request.args[1].strip()
        known = [str(label) for label in range(self.twin.num_labels[task])]
        if answer not in known:
            raise InputError(f"task {request.task_name!r}: {answer!r} is no label of {task}: {', '.join(known)}")
        return int(answer)

    def _is_regression(self, task: str) -> bool:
        return bool(self.twin.num_labels[task] == 1)


def _loaded(pretrained: str | Path | None, dtype: str | torch.dtype | None, **options: Any) -> TwinClassifier:
    """Return the twin in a directory, with the router's features kept where the environment says."""
    if pretrained is None:
        raise InputError("twin_merged: name a twin directory: pretrained=MY_TWIN")
    named = None if dtype == "auto" else dtype
    twin = TwinClassifier.from_pretrained(str(pretrained), dtype=named, **options)
    twin.feature_cache = named_directory()
    return twin

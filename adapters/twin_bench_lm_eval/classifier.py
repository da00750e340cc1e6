"""A classifier twin as an lm-eval model: labels are answers, and an answer's likelihood is the head's."""

from __future__ import annotations

import importlib.metadata
import inspect
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from tqdm import tqdm  # type: ignore[import-untyped]

from twin_bench.data.task import TaskInput, joined
from twin_bench.errors import InputError, nearest
from twin_bench.twin.cache import named_directory
from twin_bench.twin.classifier import Prediction, TwinClassifier
from twin_bench_lm_eval.model import TwinMerged, positive, usable


class Request(Protocol):
    """What is used of an lm-eval Instance."""

    args: tuple[Any, ...]
    doc: dict[str, Any]
    task_name: str | None


class ClassifierTwin(TwinMerged):
    """Serves the tasks in tasks/glue, whose rows say which text to read and which task's head is asked.

    The text comes from the row (`doc["text"]`, `doc["text_pair"]`), so that a pair is encoded as a pair;
    the context string shows the same text. All inputs of a request list are answered in one call of the
    twin, each distinct one once, and the answers do not depend on the order of the requests.
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
        **unknown: Any,
    ) -> None:
        """Load a twin directory, or serve a twin that is loaded already.

        Args:
            pretrained: the twin's directory, or
            twin: the twin itself, with its own protocol, device and dtype.
            device: where it runs; the CPU by default, and in place of a CUDA device that is not there.
            dtype: a torch dtype or its name; by default (or `auto`) the shared expert's.
            batch_size: inputs a forward; `auto` is 32.
            max_batch_size: lm-eval's, not used.
            max_length: tokens of an input, longer ones are truncated; by default what the twin was built with.
            protocol: standard (the default), paper or routed: see the README.
            tolerance: of the logits, relative to their size; by default 0 in float32: see the README.
            fusion: exact, the only mode.
            data: not used here but by the tasks, as is `split`: where their rows are.
            split: which rows.
            trust_remote_code: let transformers run code that comes with the shared expert.
            **unknown: refused.

        Raises:
            InputError: an unknown argument, a value it can't have, or whatever is wrong with the twin.
        """
        super().__init__()
        for name in unknown:
            known = inspect.signature(ClassifierTwin).parameters.keys() - {"unknown", "twin"}
            raise InputError(f"twin_merged: unknown argument {name!r}{nearest(name, known)}")
        if fusion != "exact":
            raise InputError(f"twin_merged: fusion={fusion}; known: exact")
        self.batch_size = 32 if str(batch_size).startswith("auto") else positive("batch_size", batch_size)
        if twin is None:
            if pretrained is None:
                raise InputError("twin_merged: name a twin directory: pretrained=MY_TWIN")
            twin = TwinClassifier.from_pretrained(
                str(pretrained),
                device=usable(device),
                dtype=None if dtype == "auto" else dtype,
                protocol=protocol or "standard",  # type: ignore[arg-type]
                tolerance=tolerance,
                trust_remote_code=trust_remote_code,
            )
            twin.feature_cache = named_directory()
        if protocol not in (None, twin.protocol):
            raise InputError(f"twin_merged: protocol={protocol}, but the twin was loaded for {twin.protocol}")
        self.twin = twin
        self.max_length = twin.max_length if max_length is None else positive("max_length", max_length)
        self.tokenizer = twin.tokenizer

    def loglikelihood(self, requests: Sequence[Request]) -> list[tuple[float, bool]]:
        """Return, for each (context, label id), the label's log-probability and whether it is the answer.

        The head's log-softmax. Under `routed` another task's head may answer: a label that it lacks has -inf.
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

        Under `routed` a classifying head may answer: then the number of its class.
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
        """Refuse: there is no language model here."""
        raise InputError(f"task {requests[0].task_name!r}: a classifier twin does not generate text")

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """Refuse --apply_chat_template."""
        raise InputError("twin_merged: a classifier twin has no chat template; leave out --apply_chat_template")

    def get_model_info(self) -> dict[str, Any]:
        """Return what lm-eval writes into the results' config: what the scores depend on."""
        return {
            "twin_bench_version": importlib.metadata.version("twin-bench"),
            "protocol": self.twin.protocol,
            "tolerance": self.twin.tolerance,
            "fusion": "exact",
            "max_length": self.max_length,
            "digests": dict(self.twin.digests),
        }

    def _answer(self, requests: Sequence[Request]) -> list[Prediction]:
        inputs = [self._input(request) for request in requests]
        # Sorted, so that not even the last bit of an answer depends on the order of the requests.
        distinct = sorted(set(inputs), key=lambda row: (row.task, row.text, row.text_pair or ""))
        with tqdm(total=len(distinct), desc="Running the twin", disable=None) as bar:
            predictions = self.twin.classify(
                [(row.text, row.text_pair) for row in distinct],
                [row.task for row in distinct],
                batch_size=self.batch_size,
                max_length=self.max_length,
                progress=bar.update,
            )
        answers = dict(zip(distinct, predictions, strict=True))
        return [answers[row] for row in inputs]

    def _input(self, request: Request) -> TaskInput:
        """Return what a request asks about; InputError where its row does not say it for a classifier."""
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

"""Statistics of training inputs for the methods that need them: Fisher diagonals and Gram matrices.

They are taken of an expert with its own head, in float32, over rows of {task}/train.jsonl alone, one row at a time:
no padding, no dropout, no dependence on a batch.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.progress import Progress
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from twin_bench.checkpoint import context_window
from twin_bench.compat import Conv1D
from twin_bench.data import TASKS, read_rows, solved_examples, split_path, text_pair
from twin_bench.errors import UnsuitedError
from twin_bench.generative import GenerativeTask, shuffled
from twin_bench.methods import Statistics, StatisticsKind
from twin_bench.twin.classifier import MAX_LENGTH
from twin_bench.twin.heads import heads_in_use, install_heads
from twin_bench.twin.sources import Sources, load_model

ROWS = 256
"""Training rows of a task where nothing else is said: what the authors of both methods find to be enough."""


class Example(NamedTuple):
    """One training row as the model takes it, (1, length) tensors by name.

    `answer`: how many of its last tokens are the row's answer; 0 for a classifier.
    """

    inputs: Mapping[str, Tensor]
    answer: int = 0


class Calibration(NamedTuple):
    """The experts' statistics, how many rows of each task gave them, and how long that took."""

    statistics: Statistics
    rows: Mapping[str, int]
    seconds: float


def fisher_diagonals(model: Any, examples: Iterable[Example], *, seed: int = 0) -> dict[str, Tensor]:
    """Return the diagonal of the model's Fisher information by parameter name, each in the parameter's shape.

    F = mean_x E_{y ~ p(y|x)} [(d log p(y|x) / d theta)^2], the labels being the model's own.

    Of a classifier the expectation is exact, a backward pass a label. A regression head (one label, STS-B's) is read
    as the mean of a normal distribution of unit variance, whose Fisher is (d f(x) / d theta)^2: the row's own label
    plays no part. Of a language model p(y|x) is that of the answer's tokens given the prompt: one label is drawn by
    `seed` at each position of the row's answer, given the answer before it, and F is the square of the gradient of
    their joint log-probability; its expectation is the sum of the positions' Fishers.

    The authors' code is the classifier's. RegMean's, MergeLM's and FusionBench's square the gradient of a *sum* over
    labels (and rows of a batch), which has cross terms, and use the true labels for a regression.
    """
    parameters = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    sums = {name: torch.zeros_like(parameter) for name, parameter in parameters.items()}
    generator = torch.Generator().manual_seed(seed)
    rows = 0
    for example in examples:
        rows += 1
        for weight, log_probability in _log_probabilities(model, example, generator):
            gradients = torch.autograd.grad(
                log_probability, list(parameters.values()), retain_graph=True, allow_unused=True
            )
            for total, gradient in zip(sums.values(), gradients, strict=True):
                if gradient is not None:
                    total.addcmul_(gradient, gradient, value=weight)
    return {name: (total / rows) for name, total in sums.items()}


@torch.no_grad()
def gram_matrices(model: Any, examples: Iterable[Example]) -> dict[str, Tensor]:
    """Return X^T X / n of the n inputs X (n, in) of each linear layer, (in, in) in float32; summed up in float64.

    It has the weight's name where the weight is stored (out, in), and that name with ".T" where it is stored (in, out):
    GPT-2's Conv1D. n counts tokens, as in the authors' code, so that a task of long texts weighs no more than one of
    short ones; theirs counts padding, of which there is none here.
    """
    names = dict(model.named_parameters())
    layers = {
        f"{path}.weight.T" if isinstance(module, Conv1D) else f"{path}.weight": module
        for path, module in model.named_modules()
        if isinstance(module, nn.Linear | Conv1D) and f"{path}.weight" in names  # an output layer that is tied is not
    }
    sums: dict[str, Tensor] = {}
    counts: dict[str, int] = {}
    last: list[Tensor] = []  # an input and its product: queries, keys and values read the same one

    def watch(name: str, module: nn.Module) -> Any:
        def hook(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            if not last or last[0] is not args[0]:
                x = args[0].flatten(0, -2).float()
                last[:] = args[0], x.T @ x
            sums[name] = sums[name].add_(last[1]) if name in sums else last[1].double()
            counts[name] = counts.get(name, 0) + args[0].shape[:-1].numel()

        return module.register_forward_pre_hook(hook)

    hooks = [watch(name, module) for name, module in layers.items()]
    try:
        for example in examples:
            model(**example.inputs)
    finally:
        for hook in hooks:
            hook.remove()
    return {name: (total / counts[name]).float() for name, total in sums.items()}


def calibration_examples(
    task: str, data: Path, sources: Sources, *, rows: int = ROWS, seed: int = 0, max_length: int | None = None
) -> list[Example]:
    """Return at most `rows` rows of a task's train.jsonl, drawn by the seed, as its expert reads them.

    A generative task's row is its prompt, solved examples included, with its answer behind; of one that is too long
    the last `max_length` tokens stay. Raises UnsuitedError where there is no such file, InputError where it is
    malformed.
    """
    file = split_path(data, task, "train")
    if not file.is_file():
        raise UnsuitedError(f"{file}: no such file; statistics are taken of training rows")
    kind, tokenizer = TASKS[task], sources.tokenizer
    drawn = shuffled(read_rows(file, kind), seed)[:rows]
    window = context_window(sources.config)
    if not isinstance(kind, GenerativeTask):
        limit = max_length or min(MAX_LENGTH, window)
        texts = [text_pair(dict(row), kind) for row in drawn]
        encoded = [tokenizer(a, b, truncation=True, max_length=limit, return_tensors="pt") for a, b in texts]
        return [Example(dict(inputs)) for inputs in encoded]
    solved = solved_examples(kind, data) if kind.shots else []
    examples = []
    for row in drawn:
        prompt = kind.prompt(row, kind.examples(row, solved))
        whole = tokenizer(f"{prompt} {kind.item(row).answer}")["input_ids"]
        ids = whole[-(max_length or window) :]
        answer = len(whole) - len(tokenizer(prompt)["input_ids"])
        examples.append(Example({"input_ids": torch.tensor([ids])}, min(answer, len(ids) - 1)))
    return examples


def calibrate(
    kind: StatisticsKind,
    sources: Sources,
    data: Path,
    folder: Path,
    *,
    rows: int = ROWS,
    seed: int = 0,
    max_length: int | None = None,
    progress: Progress | None = None,
) -> Calibration:
    """Return the statistics of all experts, each read from `folder`/TASK.safetensors when it is asked for.

    Those that are not there yet are computed; `folder` must stand for all that decides them. Raises as
    `calibration_examples` does, before anything is computed.
    """
    progress = progress or Progress(disable=True)
    examples = {
        task: calibration_examples(task, data, sources, rows=rows, seed=seed, max_length=max_length)
        for task in sources.experts
    }
    stored: dict[str, _Stored] = {}
    for task, own in examples.items():
        file = folder / f"{task}.safetensors"
        if not file.is_file():
            started = time.perf_counter()
            tensors = _statistics(kind, sources, task, own, seed, progress)
            folder.mkdir(parents=True, exist_ok=True)
            took = {"rows": str(len(own)), "seconds": str(time.perf_counter() - started)}
            save_file(tensors, file.with_suffix(".partial"), metadata=took)
            os.replace(file.with_suffix(".partial"), file)
        stored[task] = _Stored(file)
    counts = {task: int(own.metadata["rows"]) for task, own in stored.items()}
    return Calibration(stored, counts, sum(float(own.metadata["seconds"]) for own in stored.values()))


class _Stored(Mapping[str, Tensor]):
    """The tensors of a safetensors file, each read when it is asked for."""

    def __init__(self, file: Path) -> None:
        self._file = file
        with safe_open(file, framework="pt") as stored:
            self._names = tuple(stored.keys())
            self.metadata: dict[str, str] = stored.metadata()

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._names:
            raise KeyError(name)
        with safe_open(self._file, framework="pt") as stored:
            return stored.get_tensor(name)

    def __contains__(self, name: object) -> bool:
        return name in self._names  # Mapping's own would read the tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def _statistics(
    kind: StatisticsKind, sources: Sources, task: str, examples: Sequence[Example], seed: int, progress: Progress
) -> dict[str, Tensor]:
    """Return one expert's statistics, taken with its own head."""
    expert = sources.experts[task]
    model = load_model(sources, expert, "float32")
    heads = install_heads(model, {task: expert.head()}) if sources.bones.head else {}
    watched = progress.track(examples, description=f"{kind} {task}")
    with heads_in_use(heads, list(heads)):
        return fisher_diagonals(model, watched, seed=seed) if kind == "fisher" else gram_matrices(model, watched)


def _log_probabilities(model: Any, example: Example, generator: torch.Generator) -> Iterator[tuple[float, Tensor]]:
    """Yield (weight, log-probability), of whose squared gradients a row's Fisher is the weighted sum."""
    logits = model(**example.inputs).logits[0]
    if example.answer:
        asked = logits[-example.answer - 1 : -1].log_softmax(dim=-1)
        drawn = torch.multinomial(asked.detach().exp(), 1, generator=generator)
        yield 1.0, asked.gather(1, drawn).sum()
    elif len(logits) == 1:
        yield 1.0, logits[0]
    else:
        log_probabilities = logits.log_softmax(dim=-1)
        for log_probability in log_probabilities:
            yield log_probability.detach().exp().item(), log_probability

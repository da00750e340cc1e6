"""Statistics of training inputs for the methods that need them: Fisher diagonals and Gram matrices.

They are computed on an expert with its own head, in float32, from its tasks' rows of {task}/train.jsonl alone. Each row
is run alone, so there is no padding and no dependence on a batch. There is no dropout.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Self

import torch
from rich.progress import Progress
from torch import Tensor, nn

from twin_bench.checkpoints.finite import require_finite
from twin_bench.checkpoints.skeleton import default_max_length
from twin_bench.checkpoints.sources import Sources, load_expert
from twin_bench.compat import Conv1D
from twin_bench.data.generative import shuffled
from twin_bench.data.rows import TaskRows
from twin_bench.data.task import Row, TaskInput
from twin_bench.errors import UnsuitedError
from twin_bench.files import StoredTensors, read_tensors, write_tensors
from twin_bench.locks import made_by_one
from twin_bench.measured import Meter, Taken
from twin_bench.merging.device import exact_device
from twin_bench.merging.registry import Statistics, StatisticsKind

FORMAT = 1
"""The format of stored statistics. It is raised when their content or their computation changes."""
ROWS = 256
"""The default number of training rows of a task. The authors of both methods find this number to be enough."""


class Example(NamedTuple):
    """One training row as the model reads it: (1, length) tensors by name.

    `answer` is the number of tokens that are the row's answer: the last ones, or an encoder-decoder's `labels`. It is 0
    for a classifier.
    """

    inputs: Mapping[str, Tensor]
    answer: int = 0

    def to(self, device: torch.device) -> Example:
        """Return the example with its tensors on a device."""
        return Example({name: tensor.to(device) for name, tensor in self.inputs.items()}, self.answer)


class Calibration(NamedTuple):
    """The experts' statistics, the number of rows that each expert was shown, and what computing them took.

    `taken` is that of the run that computed them, if it was an earlier one. Its peak is that of the dearest expert.
    """

    statistics: Statistics
    rows: Mapping[str, int]
    taken: Taken


def fisher_diagonals(model: Any, examples: Iterable[Example], *, seed: int = 0) -> dict[str, Tensor]:
    """Return the diagonal of the model's Fisher information by parameter name, each in the parameter's shape.

    F = mean_x E_{y ~ p(y|x)} [(d log p(y|x) / d theta)^2]. The labels y are the model's own, not the rows'.

    For a classifier the expectation is exact and takes one backward pass for each label. A regression head (one label,
    STS-B's) is read as the mean of a normal distribution of unit variance. Its Fisher is (d f(x) / d theta)^2, and the
    row's label is not used. For a language model p(y|x) is the distribution of the answer's tokens given the prompt. At
    each position of the row's answer one label is drawn by `seed`, given the answer's tokens before it. F is the square
    of the gradient of their joint log-probability. The expectation of that square is the sum of the positions' Fishers.

    The authors' code is for classifiers. The code of RegMean's authors takes the gradient of the likeliest label alone
    (fisher_variant: hard). Their other variant (soft), MergeLM and FusionBench square the gradient of a *sum* over
    labels. All three square after summing over the rows of a batch. Such squares have cross terms. They use the true
    labels for a regression.
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
    """Return X^T X / n (in, in) in float32 of the n inputs X (n, in) of each linear layer; sums are taken in float64.

    A matrix has its weight's name if the weight is stored (out, in). It has that name with ".T" appended if the weight
    is stored (in, out), as in GPT-2's Conv1D. n counts tokens, as in the authors' code, so a task of long texts weighs
    no more than a task of short texts. The authors' count includes padding; there is no padding here.
    """
    with InputGrams(linear_layers(model)) as grams:
        for example in examples:
            model(**example.inputs)
    return grams.means()


def linear_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Return a model's linear layers by the names of their Gram matrices, without a tied output layer."""
    names = dict(model.named_parameters())
    return {
        f"{path}.weight.T" if isinstance(module, Conv1D) else f"{path}.weight": module
        for path, module in model.named_modules()
        if isinstance(module, nn.Linear | Conv1D) and f"{path}.weight" in names
    }


class InputGrams:
    """The Gram matrices of the inputs that linear layers have inside the block; see `gram_matrices`."""

    def __init__(self, layers: Mapping[str, nn.Module]) -> None:
        """Prepare to watch layers, by the names of their Gram matrices."""
        self._layers = layers
        self._sums: dict[str, Tensor] = {}
        self._counts: dict[str, int] = {}
        self._last: list[Tensor] = []  # the last input and its X^T X: queries, keys and values have the same input

    def __enter__(self) -> Self:
        """Begin to watch."""
        self._hooks = [
            layer.register_forward_pre_hook(functools.partial(self._add, name)) for name, layer in self._layers.items()
        ]
        return self

    def __exit__(self, *_: object) -> None:
        """End watching."""
        for hook in self._hooks:
            hook.remove()
        self._last = []

    def means(self) -> dict[str, Tensor]:
        """Return the Gram matrices of the layers that have run."""
        return {name: (total / self._counts[name]).float() for name, total in self._sums.items()}

    def _add(self, name: str, _: nn.Module, args: tuple[Tensor, ...]) -> None:
        if not self._last or self._last[0] is not args[0]:
            x = args[0].flatten(0, -2).float()
            self._last = [args[0], x.T @ x]
        gram = self._last[1]
        self._sums[name] = self._sums[name].add_(gram) if name in self._sums else gram.double()
        self._counts[name] = self._counts.get(name, 0) + args[0].shape[:-1].numel()


def calibration_examples(
    tasks: Sequence[TaskRows], sources: Sources, *, rows: int = ROWS, seed: int = 0, max_length: int | None = None
) -> list[Example]:
    """Return at most `rows` training rows of one expert's tasks, drawn by the seed, as the expert reads them.

    A row of a generative task is its prompt, few-shot examples included, followed by its answer. If it is too long, its
    last `max_length` tokens are kept. An encoder-decoder reads the prompt, and the answer is its target. Raises
    UnsuitedError if a task has no train.jsonl, and InputError if the file is malformed.
    """
    found: list[tuple[TaskRows, Row]] = []
    for own in tasks:
        file = own.file("train")
        if not file.exists():
            raise UnsuitedError(f"{file}: no such file; statistics are computed from training rows")
        found += [(own, row) for row in own.read("train")]
    drawn = shuffled(found, seed)[:rows]
    pools = {own.task.name: own.pool() for own in tasks}
    limit = max_length or default_max_length(sources.config, sources.skeleton.task_type)
    make = _target_example if sources.skeleton.task_type == "seq2seq_lm" else _example
    examples = []
    for own, row in drawn:
        (asked,) = own.task.inputs([row], pools[own.task.name])
        examples.append(make(sources.tokenizer, asked, own.task.answer(row), limit))
    return examples


def _target_example(tokenizer: Any, asked: TaskInput, answer: str | None, limit: int) -> Example:
    """Return a row's tokens for an encoder-decoder: its prompt's last `limit`, and the answer as the target."""
    source = tokenizer(asked.text)["input_ids"][-limit:]
    target = tokenizer(text_target=answer or "")["input_ids"][:limit]
    return Example({"input_ids": torch.tensor([source]), "labels": torch.tensor([target])}, len(target))


def _example(tokenizer: Any, asked: TaskInput, answer: str | None, limit: int) -> Example:
    """Return a row's tokens. For a language model its answer follows, and the last `limit` tokens are kept."""
    if answer is None:
        return Example(
            dict(tokenizer(asked.text, asked.text_pair, truncation=True, max_length=limit, return_tensors="pt"))
        )
    whole = tokenizer(f"{asked.text} {answer}")["input_ids"]
    ids = whole[-limit:]
    answered = len(whole) - len(tokenizer(asked.text)["input_ids"])
    return Example({"input_ids": torch.tensor([ids])}, min(answered, len(ids) - 1))


def experts_examples(
    tasks: Sequence[TaskRows], sources: Sources, *, rows: int = ROWS, seed: int = 0, max_length: int | None = None
) -> dict[str, list[Example]]:
    """Return each expert's `calibration_examples`, of its own tasks. UnsuitedError for an expert without a task."""
    examples: dict[str, list[Example]] = {}
    for name in sources.experts:
        own = [task for task in tasks if task.task.expert == name]
        if not own:
            raise UnsuitedError(f"expert {name!r}: no task is its; statistics are computed from training rows")
        examples[name] = calibration_examples(own, sources, rows=rows, seed=seed, max_length=max_length)
    return examples


def calibrate(
    kind: StatisticsKind,
    sources: Sources,
    tasks: Sequence[TaskRows],
    folder: Path,
    *,
    rows: int = ROWS,
    seed: int = 0,
    max_length: int | None = None,
    device: str = "cpu",
    progress: Progress | None = None,
) -> Calibration:
    """Return the statistics of all experts. A tensor is read from `folder`/EXPERT.safetensors when it is accessed.

    Statistics that are not stored there yet are computed on `device`, or on the CPU if the device has no float64. The
    name of `folder` must identify everything that they depend on, the kind of device included. Another process that
    would compute them waits, and reads them. Raises as
    `experts_examples` does, before anything is computed.
    """
    progress = progress or Progress(disable=True)
    examples = experts_examples(tasks, sources, rows=rows, seed=seed, max_length=max_length)
    stored: dict[str, StoredTensors] = {}
    for name, shown in examples.items():
        file = folder / f"{name}.safetensors"
        with made_by_one(file):
            found = read_tensors(file, format_number=FORMAT)
            if found is None:
                with Meter(device) as meter:
                    tensors = _statistics(kind, sources, name, shown, seed, exact_device(device), progress)
                took = {"seconds": str(meter.taken.seconds), "peak_bytes": str(meter.taken.peak_bytes)}
                write_tensors(file, tensors, format_number=FORMAT, notes={"rows": str(len(shown)), **took})
                found = StoredTensors(file)
        stored[name] = found
    counts = {name: int(own.notes["rows"]) for name, own in stored.items()}
    taken = functools.reduce(Taken.after, map(_taken, stored.values()), Taken(0.0, 0))
    return Calibration(stored, counts, taken)


def _taken(statistics: StoredTensors) -> Taken:
    """Return what computing stored statistics took. Those of an earlier version say nothing of memory."""
    peak = statistics.notes.get("peak_bytes")
    return Taken(float(statistics.notes["seconds"]), None if peak is None else int(peak))


def _statistics(
    kind: StatisticsKind,
    sources: Sources,
    task: str,
    examples: Sequence[Example],
    seed: int,
    device: torch.device,
    progress: Progress,
) -> dict[str, Tensor]:
    """Return one expert's statistics, computed with its own head. InputError if they hold NaN or inf."""
    model = load_expert(sources, task, "float32").to(device)
    placed = (example.to(device) for example in examples)
    watched = progress.track(placed, len(examples), description=f"{kind} {task}")
    found = fisher_diagonals(model, watched, seed=seed) if kind == "fisher" else gram_matrices(model, watched)
    kept = {name: tensor for name, tensor in found.items() if name.removesuffix(".T") in sources.skeleton.backbone}
    for name, tensor in kept.items():
        require_finite(
            tensor, name, f"{kind} statistics of expert {task!r}", "that expert overflows float32; retrain it"
        )
    return kept


def _log_probabilities(model: Any, example: Example, generator: torch.Generator) -> Iterator[tuple[float, Tensor]]:
    """Yield pairs (weight, log-probability): a row's Fisher is the weighted sum of their squared gradients."""
    logits = model(**example.inputs).logits[0]
    if example.answer:
        asked = (logits if "labels" in example.inputs else logits[-example.answer - 1 : -1]).log_softmax(dim=-1)
        drawn = torch.multinomial(asked.detach().cpu().exp(), 1, generator=generator).to(asked.device)
        yield 1.0, asked.gather(1, drawn).sum()
    elif len(logits) == 1:
        yield 1.0, logits[0]
    else:
        log_probabilities = logits.log_softmax(dim=-1)
        for log_probability in log_probabilities:
            yield log_probability.detach().exp().item(), log_probability

"""Task heads: every task keeps its own head, and each row of a mixed batch runs through its task's head."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from twin_bench.checkpoints.skeleton import meta_model, skeleton_of
from twin_bench.errors import InputError
from twin_bench.twin.placement import device_of


class TaskHead(nn.Module):
    """One task's head: the modules outside the base model, by their names in the model.

    `rows` holds the indices of the batch's rows that use the head, or None if no row does.
    """

    def __init__(self, modules: Mapping[str, nn.Module], num_labels: int) -> None:
        super().__init__()
        self.parts = nn.ModuleDict(modules)
        self.num_labels = num_labels
        self.rows: Tensor | None = None


class HeadSwitch(nn.Module):
    """A module in place of a model's head. It runs each row through its own task's head."""

    def __init__(self, name: str, heads: Mapping[str, TaskHead]) -> None:
        super().__init__()
        self.name = name
        self._heads = dict(heads)  # The TwinModel owns the heads. A plain dict does not register them again.

    @property
    def device(self) -> torch.device:
        """The device of the heads' parameters."""
        head = next(iter(self._heads.values()))
        return device_of(head.parts[self.name])

    def forward(self, x: Tensor) -> Tensor:
        """Return (batch, ..., labels) for x (batch, ..., width). The widest head in use sets the number of labels.

        A row whose head has fewer labels is filled up with -inf.
        """
        x = x.to(self.device)
        outputs = {
            task: head.parts[self.name](x if len(head.rows) == len(x) else x[head.rows.to(x.device)])
            for task, head in self._heads.items()
            if head.rows is not None
        }
        if len(outputs) == 1:
            return next(iter(outputs.values()))
        widest = max(output.shape[-1] for output in outputs.values())
        first = next(iter(outputs.values()))
        joined = first.new_full((len(x), *first.shape[1:-1], widest), -torch.inf)
        for task, output in outputs.items():
            own = self._heads[task].rows
            assert own is not None
            joined[own.to(x.device), ..., : output.shape[-1]] = output
        return joined


@contextmanager
def heads_in_use(heads: Any, tasks: Sequence[str], device: torch.device) -> Iterator[None]:
    """Run row i of each batch in the block, which is on `device`, through the head of tasks[i]."""
    rows: dict[str, list[int]] = {}
    for row, task in enumerate(tasks):
        rows.setdefault(task, []).append(row)
    for task, indices in rows.items():
        heads[task].rows = torch.tensor(indices, device=device)
    try:
        yield
    finally:
        for task in rows:
            heads[task].rows = None


def install_heads(model: Any, heads: Mapping[str, Mapping[str, Tensor]]) -> Any:
    """Replace the head of `model` by a HeadSwitch, and return the tasks' heads as a ModuleDict.

    InputError if a task's tensors are not those of the model's head.
    """
    skeleton = skeleton_of(model.config, "sequence_classification")
    built: dict[str, TaskHead] = {}
    names = sorted({name.partition(".")[0] for name in skeleton.head})
    for task, tensors in heads.items():
        if tensors.keys() != skeleton.head or skeleton.head_output is None:
            raise InputError(f"expert {task!r}: its head holds {sorted(tensors)}, not {sorted(skeleton.head)}")
        labels = tensors[skeleton.head_output].shape[0]
        blank = meta_model(model.config, "sequence_classification", num_labels=labels)
        blank.load_state_dict({k: v.to(model.dtype) for k, v in tensors.items()}, strict=False, assign=True)
        parts = {name: getattr(blank, name).to(device_of(getattr(model, name))) for name in names}
        built[task] = TaskHead(parts, labels)
    for name in names:
        setattr(model, name, HeadSwitch(name, built))
    return nn.ModuleDict(built)

"""Adam's state stored in a file as the steps are taken, so that learning continues after an interrupted run."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from twin_bench.checkpoints.finite import all_finite
from twin_bench.contenders import Context
from twin_bench.errors import InputError, NotFiniteError
from twin_bench.files import read_tensors, write_tensors
from twin_bench.measured import Taken

FORMAT = 1
"""The format of stored learning. It is raised when the parameters or the way they are learned change."""
STEPS_KEPT = 50
"""The state is written after so many steps, so a killed run loses fewer."""


def check_learning(context: Context, *, steps: int, learning_rate: float, batch_size: int, **others: object) -> None:
    """Raise an InputError unless the options of a method that learns are in their ranges."""
    require_learning_rate(context.name, learning_rate)
    require_batch_size(batch_size)


def require_learning_rate(method: str, learning_rate: float) -> None:
    """Raise an InputError unless learning_rate is above 0."""
    if learning_rate <= 0:
        raise InputError(f"{method}: learning_rate must be above 0, not {learning_rate}")


def require_batch_size(batch_size: int) -> None:
    """Raise an InputError unless batch_size is 1 or more."""
    if batch_size < 1:
        raise InputError(f"batch_size must be a whole number from 1, not {batch_size}")


class Learning:
    """Adam's state: the number of `steps` taken and the `seconds` they took, including those of earlier runs.

    `earlier` is what the steps of earlier runs took, whose memory nobody has kept.

    If `file` is given, it is read if it exists, and written every 50 steps and after the last one. Its name must
    identify everything that the learned parameters depend on.
    """

    def __init__(self, file: Path | None = None) -> None:
        self.steps, self.seconds = 0, 0.0
        self._file = file
        self._state: dict[str, Tensor] = {}
        stored = read_tensors(file, format_number=FORMAT) if file is not None else None
        if stored is not None:
            self._state = dict(stored)
            self.steps, self.seconds = int(stored.notes["steps"]), float(stored.notes["seconds"])
        self.earlier = Taken(self.seconds, None if self.steps else 0)

    def descend(
        self,
        parameters: Mapping[str, Tensor],
        set_gradients: Callable[[], None],
        *,
        method: str,
        steps: int,
        learning_rate: float,
    ) -> None:
        """Take the remaining ones of `steps` on named parameters, in place, as in one uninterrupted run.

        The result is the same bit for bit on the CPU. A GPU adds up gradients in an order of its own.

        Args:
            parameters: the starting point. If steps have been taken, their result replaces it.
            set_gradients: sets each parameter's gradient. It is called once a step, first for step `self.steps`.
            method: the method's name, for errors.
            steps: the number of Adam's steps, including those that have been taken.
            learning_rate: Adam's.

        Raises:
            InputError: learning_rate is not above 0, or a parameter becomes NaN or inf. A state that holds one is
                neither written nor used.
        """
        require_learning_rate(method, learning_rate)
        started = time.perf_counter() - self.seconds
        adam = torch.optim.Adam(parameters.values(), lr=learning_rate)
        for key, tensor in self._state.items():
            part, name = key.split("/", 1)
            if part == "parameter":
                parameters[name].detach().copy_(tensor)
            else:
                own = parameters[name]
                adam.state[own][part] = tensor if part == "step" else tensor.to(own.device)
        _require_finite(method, parameters, self.steps)
        while self.steps < steps:
            set_gradients()
            adam.step()
            self.steps += 1
            _require_finite(method, parameters, self.steps)
            self.seconds = time.perf_counter() - started
            if self._file is not None and (self.steps == steps or self.steps % STEPS_KEPT == 0):
                self._write(self._file, parameters, adam)

    def _write(self, file: Path, parameters: Mapping[str, Tensor], adam: torch.optim.Adam) -> None:
        state = {
            f"{part}/{name}": tensor.detach()
            for name, parameter in parameters.items()
            for part, tensor in {"parameter": parameter, **adam.state[parameter]}.items()
        }
        taken = {"steps": str(self.steps), "seconds": str(self.seconds)}
        write_tensors(file, state, format_number=FORMAT, notes=taken)


def _require_finite(method: str, parameters: Mapping[str, Tensor], steps: int) -> None:
    for name, parameter in parameters.items():
        if not all_finite(parameter.detach()):
            raise NotFiniteError(f"{method}: {name} holds NaN or inf after step {steps}; lower learning_rate")

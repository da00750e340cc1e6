"""Weights of another device: moved when they are read, one tensor at a time."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor


class OnDevice(Mapping[str, Tensor]):
    """The tensors of another mapping, each moved to `device` when it is read."""

    def __init__(self, tensors: Mapping[str, Tensor], device: str | torch.device) -> None:
        self._tensors = tensors
        self._device = device

    def __getitem__(self, name: str) -> Tensor:
        return self._tensors[name].to(self._device)

    def __contains__(self, name: object) -> bool:
        return name in self._tensors  # Mapping's own implementation would read the tensor.

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)


def exact_device(device: str | torch.device) -> torch.device:
    """Return the device on which statistics and merges are computed: `device`, or the CPU where it has no float64."""
    chosen = torch.device(device)
    return torch.device("cpu") if chosen.type == "mps" else chosen

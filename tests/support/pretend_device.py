"""A pretended accelerator: its tensors hold their data on the CPU, and an operation that mixes devices raises.

It goes by the name of torch's lazy device, which every build of torch has and nothing here uses. Under another name,
gradients could be computed only if no test had computed any before the device was registered.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch._lazy import ts_backend
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

DEVICE = "lazy"
aten = torch.ops.aten
BETWEEN_DEVICES = {aten.copy_.default, aten._to_copy.default}
INDEXED_FROM_THE_CPU = {aten.index.Tensor, aten.index_put_.default, aten._index_put_impl_.default}
ANSWERS_THE_CPU = {aten._local_scalar_dense.default, aten.equal.default}
_ran: Counter[str] = Counter()


class Pretended(Tensor):
    """A tensor on the pretended device."""

    inner: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor) -> Pretended:
        layout = {"strides": inner.stride(), "storage_offset": inner.storage_offset(), "dtype": inner.dtype}
        made = Tensor._make_wrapper_subclass(cls, inner.size(), device=torch.device(DEVICE, 0), **layout)
        made.inner = inner
        return made

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})

    def __getitem__(self, index: Any) -> Any:
        return super().__getitem__(torch.tensor(index) if isinstance(index, list) else index)

    def tolist(self) -> Any:
        return self.inner.tolist()

    def data_ptr(self) -> int:
        return self.inner.data_ptr()

    def numpy(self, *args: Any, **kwargs: Any) -> Any:
        raise TypeError(f"can't convert {DEVICE}:0 device type tensor to numpy")

    __array__ = numpy


@contextmanager
def pretended() -> Iterator[Counter[str]]:
    """Make the device usable inside the block. Yield how often each operation has run on it."""
    _initialise()
    _ran.clear()
    fused = patch("torch.optim.optimizer._get_fused_kernels_supported_devices", lambda: [DEVICE])
    with fused, _Operations(), _Functions():
        yield _ran


@cache
def _initialise() -> None:
    ts_backend.init()


class _Operations(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


class _Functions(TorchFunctionMode):
    """Makes `torch.tensor` make a tensor on the CPU first, and keeps `@` from changing a shape in place."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is Tensor.matmul and args[0].ndim == 1 and args[1].ndim == 2:
            return torch.mv(args[1].T, args[0])
        device = kwargs.pop("device", None) if func is torch.tensor else None
        made = func(*args, **kwargs)
        return made if device is None else made.to(device)


def _run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """Run an operation on the data. One tensor without dimensions may come from the CPU, as on a GPU."""
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    pretended = [tensor for tensor in tensors if isinstance(tensor, Pretended)]
    asked = kwargs.get("device")
    there = bool(pretended) if asked is None else torch.device(asked).type == DEVICE
    if not pretended and not there:
        return func(*args, **kwargs)
    _ran[func._schema.name.removeprefix("aten::")] += 1
    if pretended and func not in BETWEEN_DEVICES:
        own = tensors if func not in INDEXED_FROM_THE_CPU else [args[0], *tree_leaves(args[2:])]
        strangers = [t for t in own if isinstance(t, Tensor) and not isinstance(t, Pretended)]
        number = len(strangers) == 1 and not strangers[0].ndim and torch.Tag.pointwise in func.tags
        if strangers and not number:
            raise RuntimeError(f"{func}: tensors on {DEVICE}:0 and, of shape {tuple(strangers[0].shape)}, on the cpu")
    if asked is not None:
        kwargs = {**kwargs, "device": torch.device("cpu")}
    given = {id(_inner(tensor)): tensor for tensor in tensors}
    found = func(*tree_map(_inner, args), **tree_map(_inner, kwargs))
    there = there and func not in ANSWERS_THE_CPU

    def back(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        return given.get(id(value), Pretended(value) if there else value)

    return tree_map(back, found)


def _inner(value: Any) -> Any:
    return value.inner if isinstance(value, Pretended) else value

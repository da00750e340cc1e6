"""Task vectors: tau_t = theta_t - theta_0, read lazily, one parameter at a time."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from twin_bench.checkpoints.finite import all_finite, require_dtype, require_no_overflow, require_weights
from twin_bench.errors import InputError, shown

PerParameter = Callable[[str, Tensor], Tensor]
Merge = Callable[[str, Tensor, Tensor], Tensor]


class TaskVectors(Mapping[str, Tensor]):
    """The stacked task vectors of T experts over one base model.

    `vectors[name]` is a (T, *shape) tensor in float32, or in float64 if the base is float64. It is computed on access,
    and its rows follow `experts`. Only floating-point parameters have a task vector. The names are the base's. A tensor
    that an expert lacks, or has in another shape or in a dtype that weights don't have, is an InputError that names it.
    So is one that holds NaN or inf.

    `transposed` names the matrices that are stored (in, out), as the weights of GPT-2's Conv1D layers are. All others
    are read as torch.nn.Linear's, (out, in).
    """

    def __init__(
        self,
        base: Mapping[str, Tensor],
        experts: Mapping[str, Mapping[str, Tensor]],
        *,
        transposed: Collection[str] = frozenset(),
    ) -> None:
        _require_tensors(base, "base")
        if not isinstance(experts, Mapping):
            raise TypeError(
                f"experts must be a mapping of names to models, not {type(experts).__name__} {shown(experts)}"
            )
        if not experts:
            raise InputError("there is no expert to merge; name at least one")
        if not base:
            raise InputError("base has no tensor; give the pretrained model's parameters")
        for name, expert in experts.items():
            if not isinstance(name, str):
                raise TypeError(f"experts: a name must be a text, not {type(name).__name__} {shown(name)}")
            _require_tensors(expert, f"expert {name!r}")
        self.base = base
        self.experts = tuple(experts)
        self.transposed = transposed
        self._pretrained = base
        self._experts = experts
        self._transforms: tuple[PerParameter, ...] = ()

    def __getitem__(self, name: str) -> Tensor:
        vectors = self._differences(name)
        for transform in self._transforms:
            vectors = transform(name, vectors)
        return vectors

    def __iter__(self) -> Iterator[str]:
        return iter(self.base)

    def __len__(self) -> int:
        return len(self.base)

    def map(self, transform: PerParameter) -> TaskVectors:
        """Return these task vectors with `transform(name, (T, *shape))` applied on access.

        `transform` may change its argument in place.
        """
        mapped = TaskVectors(self._pretrained, self._experts, transposed=self.transposed)
        mapped.base = self.base
        mapped._transforms = (*self._transforms, transform)
        return mapped

    def represented(self, transform: PerParameter, base: Mapping[str, Tensor]) -> TaskVectors:
        """Return these task vectors in another representation, `transform(name, (T, *shape))`, which may be any shape.

        `base` holds theta_0 in that representation, in the same dtypes. What is not floating point is theta_0's
        own. Matrices of the representation are (out, in), all of them. `transform` may change its argument in place.
        """
        represented = self.map(transform)
        represented.base, represented.transposed = base, frozenset()
        return represented

    def as_linear(self, name: str, tensor: Tensor) -> Tensor:
        """Return a view of a parameter, or of a stack of them, with matrices turned to (out, in), or back from that."""
        return tensor.mT if name in self.transposed else tensor

    def floating(self) -> list[str]:
        """Return the names of the parameters that have a task vector: the floating-point ones."""
        return [name for name in self if self._pretrained[name].is_floating_point()]

    def merged(self, merge: Merge) -> Merged:
        """Return the lazy mapping of `merge(name, theta_0, tau)` over all parameters."""
        return Merged(self, merge)

    def _differences(self, name: str) -> Tensor:
        base = self._pretrained[name]
        require_dtype(base, name, "base model")
        exact = torch.promote_types(base.dtype, torch.float32)
        vectors = None
        for row, task in enumerate(self.experts):
            theirs = self._expert(task, name, base).detach()
            if vectors is None:
                if theirs.dtype == base.dtype and torch.equal(theirs.to(base.device), base):
                    continue
                vectors = torch.empty(len(self.experts), *base.shape, dtype=exact, device=base.device)
                vectors[:row] = base.detach()
            vectors[row] = theirs
        if vectors is None:  # as embeddings that no adapter changes
            require_weights(base, name, "base model")
            return _zeros((len(self.experts), *base.shape), exact, base.device)
        vectors -= base.detach().to(exact)
        if not all_finite(vectors):
            for task in self.experts:
                require_weights(self._experts[task][name], name, task)
            require_weights(base, name, "base model")
            require_no_overflow(vectors, name, "task vectors")
        return vectors

    def unmerged(self, name: str) -> Tensor:
        """Return the base's own tensor for a name without task vector, such as a buffer of position ids.

        InputError if an expert has other values there: they would be lost. The buffer of an expert may be longer or
        shorter. A tensor without dimensions, such as a counter of batches, may differ.
        """
        base = self._pretrained[name]
        kind = str(base.dtype).removeprefix("torch.")
        for task, expert in self._experts.items():
            if base.is_complex():
                raise InputError(
                    f"expert {task!r}: tensor {name} is {kind} in the base model and can't be merged; convert base "
                    "model and experts, or leave the tensor out of both"
                )
            if base.ndim and name in expert and not _same_where_both(expert[name].to(base.device), base):
                raise InputError(
                    f"expert {task!r}: the values of tensor {name} differ from the base model's, and {kind} can't be "
                    "merged; dequantise base model and experts if these are weights, or leave the tensor out of both"
                )
        return base.clone()

    def _expert(self, task: str, name: str, base: Tensor) -> Tensor:
        expert = self._experts[task]
        if name not in expert:
            raise InputError(f"expert {task!r} has no tensor {name}; was it trained from another base model?")
        tensor = expert[name]
        require_dtype(tensor, name, f"expert {task!r}")
        if tensor.shape != base.shape:
            raise InputError(
                f"expert {task!r}: tensor {name} is {tuple(tensor.shape)}, the base model's is "
                f"{tuple(base.shape)}; resize the vocabulary, or drop the head from both and merge the backbone only"
            )
        return tensor


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return zeros. On the CPU they take no memory until they are written to: torch's own are written at once."""
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    return torch.from_numpy(np.zeros(shape, np.float64 if dtype == torch.float64 else np.float32))


def _same_where_both(one: Tensor, other: Tensor) -> bool:
    """Return whether two tensors are equal, up to the end of the shorter one along the last dimension."""
    if one.shape[:-1] != other.shape[:-1] or one.ndim != other.ndim:
        return False
    common = min(one.shape[-1], other.shape[-1])
    return bool((one[..., :common] == other[..., :common]).all())


def _require_tensors(model: Any, what: str) -> None:
    """Raise a TypeError unless a model is a mapping, and a dict's values dense tensors. Lazy mappings are not read."""
    if not isinstance(model, Mapping):
        raise TypeError(f"{what} must be a mapping of names to tensors, not {type(model).__name__} {shown(model)}")
    for name, value in model.items() if isinstance(model, dict) else ():
        if not isinstance(value, Tensor):
            raise TypeError(f"{what}: {name} must be a tensor, not {type(value).__name__} {shown(value)}")
        if value.is_meta or value.layout != torch.strided:
            raise TypeError(f"{what}: {name} must be a dense tensor that holds values, not {shown(value)}")


class Merged(Mapping[str, Tensor]):
    """A merged model as a lazy mapping: a parameter is computed when it is read, in the base's dtype.

    Parameters that are not floating point (position ids, for example) are the base's own.
    """

    def __init__(self, vectors: TaskVectors, merge: Merge) -> None:
        self._vectors = vectors
        self._merge = merge

    def __getitem__(self, name: str) -> Tensor:
        base = self._vectors.base[name]
        if not base.is_floating_point():
            return self._vectors.unmerged(name)
        return self.exact(name).to(base.dtype)

    def exact(self, name: str) -> Tensor:
        """Return a floating-point parameter in float32 or better, before it takes the base's dtype."""
        base = require_dtype(self._vectors.base[name], name, "base model")
        exact = torch.promote_types(base.dtype, torch.float32)
        return self._merge(name, base.detach().to(exact), self._vectors[name])

    def map(self, transform: Merge) -> Merged:
        """Return this merge with `transform(name, theta_0, theta)` applied to its floating-point parameters."""
        merge = self._merge
        return Merged(self._vectors, lambda name, base, taus: transform(name, base, merge(name, base, taus)))

    def __iter__(self) -> Iterator[str]:
        return iter(self._vectors)

    def __len__(self) -> int:
        return len(self._vectors)


class FiniteMerge(Mapping[str, Tensor]):
    """The result of a merge method. Reading a parameter that holds NaN or inf raises an InputError that names it."""

    def __init__(self, method: str, merged: Mapping[str, Tensor]) -> None:
        self._method = method
        self._merged = merged

    def __getitem__(self, name: str) -> Tensor:
        return require_no_overflow(self._merged[name], name, self._method)

    def __contains__(self, name: object) -> bool:
        return name in self._merged  # Mapping's own implementation would compute the parameter.

    def __iter__(self) -> Iterator[str]:
        return iter(self._merged)

    def __len__(self) -> int:
        return len(self._merged)

"""Budgets of exclusive vectors: what a direction costs, and which budget holds none, before a merge is made."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from twin_bench.checkpoints.sources import Sources
from twin_bench.errors import InputError
from twin_bench.twin.exclusive.quantised import direction_bytes
from twin_bench.twin.exclusive.settings import Bytes, ExclusiveSettings


def direction_cost(shape: tuple[int, int], dtype: torch.dtype, bits: int | None) -> int:
    """Return the bytes of one direction of an (m, n) difference: of factors in its dtype, or in `bits`."""
    return direction_bytes(shape, bits) * (dtype.itemsize // 4 if bits is None else 1)


def require_budget(budget: int, expert: str, vectors: int, costs: Mapping[str, int]) -> None:
    """Raise an InputError for a budget in bytes that holds not even one direction.

    Args:
        budget: The bytes for one expert.
        expert: Its name.
        vectors: The bytes of its vectors, which are kept whole.
        costs: The bytes of one direction of each of its matrices, by name.
    """
    smallest = min(costs, key=lambda name: costs[name], default="")
    least = costs.get(smallest, 0)
    if budget - vectors < least:
        first = f", and rank 1 of the smallest matrix ({smallest}) {least}" if smallest else ""
        raise InputError(
            f"exclusive: a budget of {budget} bytes is too small for expert {expert!r}: its vectors take "
            f"{vectors}{first}; give at least {vectors + least}"
        )


def check_budget(settings: ExclusiveSettings, sources: Sources) -> None:
    """Raise an InputError for a budget that is too small for an expert, as far as is known before the merge.

    Vectors are counted that the expert changes itself, and one direction of the smallest matrix that some expert
    changes. Vectors that are equal in all experts may be the shared expert's as well, and one expert alone may be the
    shared expert: they are not counted. With `from_layer` no vectors are counted, because some of them may be left out.
    """
    if settings.budget is None or len(sources.experts) == 1:
        return
    shapes = sources.skeleton.backbone
    dtypes = {name: sources.base.dtype(name) for name in shapes}
    exact = {name: torch.promote_types(one, torch.float32) for name, one in dtypes.items() if one.is_floating_point}
    whole = sum(shape.numel() * dtypes[name].itemsize for name, shape in shapes.items())
    budget = settings.budget.bytes if isinstance(settings.budget, Bytes) else int(settings.budget * whole)
    changed = _may_change(sources)
    directions = {
        name: direction_cost((shape[0], shape[1]), exact[name], settings.bits)
        for name, shape in shapes.items()
        if len(shape) == 2 and name in exact and name in changed
    }
    smallest = next((name for name in sorted(directions, key=lambda n: directions[n]) if _differs(sources, name)), None)
    costs = {} if smallest is None else {smallest: directions[smallest]}
    vectors = [name for name, shape in shapes.items() if len(shape) == 1 and name in exact and name in changed]
    own = [] if settings.from_layer is not None else [name for name in vectors if not _all_equal(sources, name)]
    for expert, model in sources.experts.items():
        differing = (name for name in own if not torch.equal(model[name], sources.base[name]))
        kept = sum(shapes[name].numel() * exact[name].itemsize for name in differing)
        require_budget(budget, expert, kept, costs)


def _all_equal(sources: Sources, name: str) -> bool:
    """Return whether all experts have the same values of a parameter."""
    first, *others = (model[name] for model in sources.experts.values())
    return all(torch.equal(first, other) for other in others)


def _differs(sources: Sources, name: str) -> bool:
    """Return whether some expert changes a parameter."""
    return any(not torch.equal(model[name], sources.base[name]) for model in sources.experts.values())


def _may_change(sources: Sources) -> set[str]:
    """Return the names of the parameters that an expert may change: of an adapter, those that it stores."""
    names: set[str] = set()
    for expert in sources.experts.values():
        stored = expert.low_rank.keys() | expert.replaced
        names |= stored or sources.skeleton.backbone.keys()
    return names

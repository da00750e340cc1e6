"""What a LoRA adapter holds of a twin's models, and what it can't hold."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from torch import Tensor

from twin_bench.checkpoints.factors import Factors
from twin_bench.errors import InputError, UnsuitedError
from twin_bench.export.fused import summed, weighted
from twin_bench.export.stored import StoredTwin
from twin_bench.twin.exclusive import Exclusive

SHOWN = 4
"""How many parameters of a kind a message names."""

Refused = Callable[[str], str | None]
"""A function from the name of a matrix to the reason why an adapter can't hold its factors, or None if it can."""

VECTOR = "1-D, a bias or a norm"
SPARSE = "no product of two factors, but single entries"


@dataclass(frozen=True)
class Adapter:
    """A model as a LoRA adapter: the factors of each matrix, and the reason for each parameter that it can't hold."""

    factors: Mapping[str, Factors]
    lost: Mapping[str, str]

    @property
    def rank(self) -> int:
        """The largest rank of a matrix."""
        return max((len(pair.A) for pair in self.factors.values()), default=0)


def lost_of(own: Exclusive, refused: Refused) -> dict[str, str]:
    """Return the names of an exclusive vector's parameters that an adapter can't hold, each with the reason."""
    reasons = {name: reason for name in own.factors if (reason := refused(name))}
    return {**reasons, **dict.fromkeys(own.sparse, SPARSE), **dict.fromkeys(own.vectors, VECTOR)}


def without(own: Exclusive, lost: Mapping[str, str]) -> Exclusive:
    """Return what an adapter holds of an exclusive vector."""
    factors = {name: pair for name, pair in own.factors.items() if name not in lost}
    return replace(own, factors=factors, vectors={}, sparse={}, quantised={})


def adapters_of(
    twin: StoredTwin, models: Mapping[str, Tensor], refused: Refused, *, leave_out: bool
) -> dict[str, Adapter]:
    """Return the adapter of each model, by name.

    The factors of quantised exclusive vectors are what their codes stand for.

    Args:
        twin: the twin.
        models: fusion weights (experts,) by name.
        refused: the reason why the format can't hold a matrix' factors, or None.
        leave_out: whether what can't be held is left out. Otherwise it is refused.

    Raises:
        UnsuitedError: an adapter can't hold all of a model, or nothing of it.
    """
    found = {}
    for name, weights in models.items():
        experts = weighted(twin.parts.exclusive, weights)
        lost = {parameter: why for _, own in experts for parameter, why in lost_of(own, refused).items()}
        if lost and not leave_out:
            raise UnsuitedError(
                f"{name}: an adapter can't hold {told(lost)}; give --leave-out to leave them out (--data ROWS measures "
                "what that changes), or --format hf, which holds everything"
            )
        held = dict.fromkeys(parameter for _, own in experts for parameter in own.factors if parameter not in lost)
        if not held:
            raise UnsuitedError(
                f"{name}: nothing is left for an adapter"
                f"{f' without {told(lost)}' if lost else ': it is the shared expert'}; export it with --format hf"
            )
        found[name] = Adapter({parameter: summed(parameter, experts) for parameter in held}, lost)
    return found


def told(lost: Mapping[str, str]) -> str:
    """Return what is lost in words: for each reason, how many parameters and the first of their names."""
    parts = []
    for reason in dict.fromkeys(lost.values()):
        names = [name for name in lost if lost[name] == reason]
        more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
        parts.append(f"{', '.join(names[:SHOWN])}{more} ({reason})")
    return "; ".join(parts)


def require_rank(adapter: Adapter, name: str, largest: int, server: str) -> None:
    """Raise an InputError that names the matrix of the largest rank if a server takes no adapter of that rank."""
    if adapter.rank > largest:
        matrix = max(adapter.factors, key=lambda one: len(adapter.factors[one].A))
        raise InputError(
            f"{name}: {matrix} has rank {adapter.rank}, and {server} takes {largest} at most; build the twin with "
            f"exclusive: {{rank: {largest}}} or a mixture of fewer experts"
        )

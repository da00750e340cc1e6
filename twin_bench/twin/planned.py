"""What of a twin plans its batches and runs them: the costs and the memory that its plans count with."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from twin_bench.errors import InputError
from twin_bench.twin.device import free_memory
from twin_bench.twin.fusion import Fusion
from twin_bench.twin.layers import find_together
from twin_bench.twin.memory import ONE_FORWARD, Budget, Sizes, Use, gigabytes, memory_limit
from twin_bench.twin.placement import input_device
from twin_bench.twin.plan import Costs, Group, batches, plan
from twin_bench.twin.sizes import sizes_of
from twin_bench.twin.timing import timed


class PlannedModel(nn.Module):
    """A model with twin layers whose lists are planned: a TwinModel.

    `model` is the transformers model and `fusion` controls its twin layers. `max_memory` is the number of bytes that
    the twin and its batches may take (see `limit_memory`).
    """

    model: Any
    fusion: Fusion
    expert_names: tuple[str, ...]
    max_memory: int | None = None

    @property
    def device(self) -> torch.device:
        """The device of the shared expert's parameters. Of several devices it is the one that inputs go to."""
        return input_device(self.model)

    def limit_memory(self, limit: int | str | None) -> None:
        """Have the twin and its batches take at most `limit` bytes, or a text such as 40GB, of its device.

        It binds lists, whose batches are planned. What a caller runs as one batch, as `twin(...)`, `twin.route(...)`
        and `twin.generate(...)` do, is not cut: where it does not fit, it is refused before anything is run. Without a
        limit the plans on CUDA count with the memory that is free when they are made, less a tenth, rounded down. On
        other devices, and on several, nothing is counted.

        Raises:
            InputError: no size, or one that does not hold the twin itself.
        """
        found = memory_limit(limit)
        if found is not None and self.sizes.held >= found:
            raise InputError(
                f"max_memory {limit}: the twin alone takes {gigabytes(self.sizes.held)}; give more, or take a smaller "
                "dtype or quantization=4bit"
            )
        self.max_memory = found

    @functools.cached_property
    def sizes(self) -> Sizes:
        """The bytes that the twin and its batches take, computed from shapes."""
        tensors = itertools.chain(self.named_parameters(), self.named_buffers())
        kept = (tensor for name, tensor in tensors if not name.endswith((".fused_weight", ".fused_bias")))
        return sizes_of(self.model, self.fusion, sum(tensor.nbytes for tensor in kept if not tensor.is_meta))

    def budget(self, use: Use = ONE_FORWARD, asked: Mapping[int, int] | None = None) -> Budget | None:
        """Return what the batches of a list may take. None where nothing limits them.

        Args:
            use: what the batches have in common.
            asked: the number of each row's last positions whose logits are needed; None for one each.
        """
        if self.max_memory is not None:
            return Budget(self.sizes, self.max_memory - self.sizes.held, use, asked)
        several = len({*getattr(self.model, "hf_device_map", {}).values()}) > 1
        copied = self.sizes.copy if self.fusion.holds_copies else 0
        free = None if several else free_memory(self.device, copied)
        return None if free is None else Budget(self.sizes, free, use, asked)

    def require_room(self, lengths: Sequence[int], positions: Sequence[int] | int = 1, use: Use = ONE_FORWARD) -> None:
        """Raise an InputError unless each row fits into memory alone: before work on a list begins.

        Args:
            lengths: the rows' token counts.
            positions: the number of each row's last positions whose logits are needed.
            use: what is done with the rows.
        """
        budget = self.budget(use)
        if budget is not None:
            budget.require(np.asarray(lengths), np.asarray(positions))

    def require_batch(self, rows: int, tokens: int, positions: int = 1, use: Use = ONE_FORWARD) -> None:
        """Raise an InputError unless a caller's own batch fits into `max_memory` as it is, fused or not.

        Args:
            rows: the number of its rows.
            tokens: their length, padding included.
            positions: the number of each row's positions whose logits are needed.
            use: what is done with the rows.
        """
        if self.max_memory is not None and (budget := self.budget(use)) is not None:
            budget.require(tokens, positions, rows)

    def release(self) -> None:
        """Free the fused copy of the weights. The next fusion makes it anew."""
        self.fusion.release()

    def planned(
        self,
        keys: Tensor,
        tokens: Sequence[int],
        batch_size: int,
        rows: Sequence[int] | None = None,
        *,
        asked: Mapping[int, int] | None = None,
    ) -> Iterator[Group]:
        """Yield the batches of a plan for one forward of each row: group after group, longest rows first.

        Args:
            keys: (N, K). Rows with equal keys can share a fusion.
            tokens: the N rows' token counts.
            batch_size: the largest number of rows in a batch.
            rows: the rows to run; by default all N.
            asked: the number of each row's positions whose logits are needed; None for one each.
        """
        budget = self.budget(asked=asked)
        for group in plan(keys, tokens, self.costs, rows=rows, batch_size=batch_size, budget=budget):
            yield from batches(group, tokens, batch_size, self.costs, budget=budget, weights=keys)

    def fused(self, group: Group, keys: Tensor, *, steps: bool = False) -> AbstractContextManager[None]:
        """Return a context in which the model runs a batch of a plan.

        The model has the group's fused weights, or each row its own ones where the group takes the low-rank path.

        Args:
            group: the rows of the batch.
            keys: (N, K), the keys of the plan, which `group.rows` index. Keys on the CPU make nothing wait.
            steps: whether the model runs many forwards in the context, as in a generation.
        """
        if group.weights is not None:
            return self.fusion.fuse(*self._split(group.weights))
        if group.crowded:
            self.release()
        by_row = self.fusion.per_row(*self._split(keys[list(group.rows)]), steps=steps)
        return by_row if self.fusion.together_known else self._watched(by_row)

    @contextmanager
    def _watched(self, block: AbstractContextManager[None]) -> Iterator[None]:
        with find_together(self.fusion), block:
            yield

    @functools.cached_property
    def costs(self) -> Costs:
        """The costs that the planner compares. On a GPU they are measured when they are first asked for."""
        if self.device.type == "cpu":
            return self.fusion.costs()
        return self.fusion.costs(timed(self.model, self.fusion))

    def shared_batches(
        self, group: Group, lengths: Sequence[int] | Mapping[int, int], batch_size: int, prefix: int = 0
    ) -> Iterator[Group]:
        """Yield the batches of rows that the shared expert alone runs, which needs no fused copy.

        Args:
            group: the rows.
            lengths: each row's token count, without the `prefix` tokens that were run before.
            batch_size: the largest number of rows in a batch.
            prefix: the number of these tokens.

        Raises:
            InputError: a row that does not fit into memory.
        """
        budget = self.budget(Use(shared=True, prefix=prefix), dict.fromkeys(group.rows, 0))
        if budget is not None:
            budget.require(max(lengths[row] for row in group.rows), 0)
        for batch in batches(group, lengths, batch_size, self.costs, budget=budget):
            if batch.crowded:
                self.release()
            yield batch

    def _split(self, keys: Tensor) -> tuple[Tensor, Tensor]:
        """Return the fusion weights and the biases' weights that a row's key (or rows' keys) consists of."""
        experts = len(self.expert_names)
        return (keys, keys) if keys.shape[-1] == experts else (keys[..., :experts], keys[..., -experts:])

"""Fusion: theta*(x) = theta_s + sum_t w_t(x) v_t for every row of a mixed batch, exactly.

theta_s is the shared expert, v_t the exclusive vector of expert t, and w_t(x) the router's fusion weights for input x.
Every layer that some expert changes is replaced by one of `twin_bench.twin.layers`. A model has one `Fusion` object,
which sets the mode in which all these layers run:

- shared: theta_s alone, for the router's features;
- fused:  W = W_s + B diag(w) A is computed once, and the layer runs as a plain layer (`Fusion.fuse`);
- rows:   y = W_s x + B (w * (A x)), with different weights w for each row (`Fusion.per_row`).

Experts that keep single entries of a matrix in place of factors have a matrix D_t each: W = W_s + sum_t w_t D_t, and
y = W_s x + sum_t w_t D_t x over the experts that have a weight in the row (see `twin_bench.twin.layers.entries`).

B and A hold the factors of all experts side by side. They have R = sum_t r_t columns, and column c belongs to expert
`owner[c]`. A batch is multiplied only by the columns of experts that have a weight in some row, or by the experts'
joint basis (`twin_bench.twin.basis`) if there is one and it is cheaper.
Biases and norms are fused for each row as well. Embeddings are fused for the tokens that occur, and an output layer
that is tied to the embeddings uses the embeddings' factors.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, ClassVar, Literal, NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor

from twin_bench.twin.placement import device_of
from twin_bench.twin.plan import Costs
from twin_bench.twin.speed import CPU_BATCH_TOKENS, CPU_RATE, CPU_REBUILD_TOKENS, CPU_STEP_TOKENS, DeviceSpeed
from twin_bench.twin.vectors import Place, Stack, VectorKind, stacked

Mode = Literal["shared", "fused", "rows"]
Made = TypeVar("Made")


class Fusion:
    """The mode and the fusion weights with which the twin layers of one model run at the moment.

    `weights` is (experts,) in the mode `fused` and (batch, experts) in the mode `rows`, on the model's device.
    `bias_weights` has the same shape and applies to biases. It differs from `weights` only under the protocol paper,
    which takes all biases from the true task's expert.

    `keeps_copies` says whether layers may keep fused copies of their weights. Without them only `per_row` is to be had,
    and the planner chooses nothing else. `mixes` says whether rows with weights of their own can share a batch, which
    they can't where a layer reads what all rows share. `dtype` is that of the model's parameters that are not
    quantised. Layers may be on several devices. What is computed for all layers is then computed once for each device.

    A caller gives weights on the CPU or on the device. What depends on their values, such as which experts are in use,
    is decided on the CPU when a block begins. So weights that are on the CPU make no layer wait for the device.

    A model is in one mode at a time. The blocks of `shared`, `fuse` and `per_row` therefore hold a lock: another thread
    waits until the block ends. A thread may open one block inside another.
    """

    def __init__(self, experts: int, dtype: torch.dtype = torch.float32) -> None:
        self.experts, self.dtype = experts, dtype
        self.keeps_copies = True
        self.mixes = True
        self._lock = threading.RLock()
        self.layers: list[FusedLayer] = []
        self._setting = Setting()
        self._fused: tuple[Tensor, Tensor] | None = None
        self._stacks: dict[VectorKind, dict[Place, Stack]] = {}
        self.together: list[Together] = []
        self.together_known = False
        self._watch: Watch | None = None

    @property
    def mode(self) -> Mode:
        """The mode of the innermost block."""
        return self._setting.mode

    @property
    def weights(self) -> Tensor | None:
        """The fusion weights of the innermost block, None in the mode `shared`."""
        return self._setting.weights

    @property
    def bias_weights(self) -> Tensor | None:
        """The biases' weights of the innermost block, None in the mode `shared`."""
        return self._setting.bias_weights

    @property
    def known_weights(self) -> Tensor | None:
        """The fusion weights on the CPU. None if they are known on the device alone."""
        return self._setting.known

    @property
    def in_steps(self) -> bool:
        """Whether the innermost block runs many forwards, as a generation does."""
        return self._setting.steps

    @contextmanager
    def shared(self) -> Iterator[None]:
        """Run the block with the shared expert alone."""
        with self._running(Setting()):
            yield

    @contextmanager
    def fuse(self, weights: Tensor, bias_weights: Tensor | None = None) -> Iterator[None]:
        """Run the block with weights (experts,) fused into every layer.

        The fused weights are kept, and computed again only for other weights.

        Raises:
            RuntimeError: the layers keep no fused copies of their weights.
        """
        if not self.keeps_copies:
            raise RuntimeError("no layer keeps a fused copy of its weight: use per_row")
        biases = weights if bias_weights is None else bias_weights
        setting = self._entered("fused", weights, biases)
        with self._running(setting):
            known = _known(weights), _known(biases)
            if self._fused is None or not all(map(torch.equal, self._fused, known)):
                self._fused = None
                assert setting.weights is not None
                assert setting.bias_weights is not None
                for layer in self.layers:
                    layer.fuse(setting.weights, setting.bias_weights)
                self._fused = known[0].clone(), known[1].clone()
            yield

    @contextmanager
    def per_row(self, weights: Tensor, bias_weights: Tensor | None = None, *, steps: bool = False) -> Iterator[None]:
        """Run the block with weights (batch, experts), of which weights[b] applies to row b of every batch.

        `steps` says that the block runs many forwards, as a generation does. Layers then keep what they compute from
        the weights alone until it ends.
        """
        with self._running(self._entered("rows", weights, weights if bias_weights is None else bias_weights, steps)):
            yield

    @contextmanager
    def compiled(self) -> Iterator[None]:
        """Run the block in the same mode with the same weights, by code that a graph of operations can be made of.

        Nothing in the block depends on the weights' values, so that one graph serves any weights.
        """
        now = self._setting
        with self._running(Setting(now.mode, now.weights, now.bias_weights)):
            yield

    @property
    def holds_copies(self) -> bool:
        """Whether the layers hold a fused copy of their weights."""
        return any(getattr(layer, "fused_weight", None) is not None for layer in self.layers if layer.is_matrix)

    def release(self) -> None:
        """Free the fused copy of the weights. The next fusion makes it anew."""
        with self._lock:
            self._fused = None
            for layer in self.layers:
                layer.fused_weight = None

    def forget(self) -> None:
        """Compute everything anew next time. The model's parameters have changed, or their dtype or device has."""
        self._fused, self._stacks = None, {}
        for together in self.together:
            together.forget()

    def follow(self, weights: Tensor) -> None:
        """Run with weights (batch, experts) as `per_row` does, from here on. It is for a router inside the model."""
        self._setting = Setting("rows", weights, weights)

    @property
    def waiting(self) -> dict[Any, Any]:
        """What layers that read the same input have computed for each other, and have not fetched yet."""
        return self._setting.waiting

    @contextmanager
    def watched(self, watch: Watch) -> Iterator[None]:
        """Run the block, and call `watch` with the linear layers that it runs on the low-rank path and their inputs."""
        with self._lock:
            before, self._watch = self._watch, watch
            try:
                yield
            finally:
                self._watch = before

    def seen(self, layer: Any, x: Tensor) -> None:
        """Tell of a layer's call, if the model is watched. A compiled graph tells nothing."""
        if not torch.compiler.is_compiling() and self._watch is not None:
            self._watch(layer, x)

    def cast(self, like: Tensor) -> Tensor:
        """Return the fusion weights in the dtype of `like`. They are cast once for all layers of that dtype."""
        weights = self.weights
        assert weights is not None
        return self._setting.once(("weights", like.dtype, like.device), lambda: weights.to(like))

    def columns(self, layer: FusedLayer) -> Columns:
        """Return the columns in use of a layer's factors, and their weights in the dtype of the layer's weight.

        The result is computed once for all layers with the same ranks on a device.
        """

        def make() -> Columns:
            weights = self.cast(layer.weight)
            if all(uses or not rank for uses, rank in zip(self._setting.uses, layer.ranks, strict=True)):
                return Columns(None, weights[..., layer.owner])
            owner = [expert for expert, rank in enumerate(layer.ranks) for _ in range(rank)]
            used = [column for column, expert in enumerate(owner) if self._setting.uses[expert]]
            places = torch.tensor([[owner[column] for column in used], used], dtype=torch.long)
            places = places.to(weights.device, non_blocking=True)
            return Columns(places[1], weights[..., places[0]])

        like = layer.weight
        return self._setting.once(("columns", layer.ranks, like.dtype, like.device), make)

    def users(self, device: torch.device) -> dict[int, Tensor]:
        """Return the experts that have a weight in some row, each with the indices of these rows on `device`.

        The result is computed once for all layers of the device.
        """

        def make() -> dict[int, Tensor]:
            weights = self.weights
            assert weights is not None
            rows, experts = (weights if self.known_weights is None else self.known_weights).nonzero(as_tuple=True)
            found = {expert: rows[experts == expert] for expert in experts.unique().tolist()}
            return {expert: own.to(device, non_blocking=True) for expert, own in found.items()}

        return self._setting.once(("users", device), make)

    def vectors(self, layer: FusedLayer, kind: VectorKind) -> Tensor:
        """Return a layer's fused 1-D weight or bias: (n,) in the mode `fused`, (batch, n) in the mode `rows`.

        Those of all layers of a device are computed in one product.
        """
        if kind not in self._stacks:
            with torch.inference_mode(False):  # what is kept is used outside it as well
                self._stacks[kind] = stacked(self.layers, kind)
        place = layer.weight.dtype, layer.weight.device
        stack = self._stacks[kind][place]

        def make() -> Tensor:
            weights = self.bias_weights if kind == "bias_vectors" else self.weights
            assert weights is not None
            weights = weights.to(stack.vectors)
            if weights.ndim == 1:
                return torch.add(stack.shared, weights @ stack.vectors, out=stack.fused)
            return torch.addmm(stack.shared, weights, stack.vectors)

        return self._setting.once((kind, place), make)[..., stack.places[id(layer)]]

    def chosen(self, key: Hashable, choose: Callable[[], Made]) -> Made:
        """Return what `choose` decides by the weights' values. A block decides it once for each key."""
        return self._setting.once(key, choose)

    def kept(self, layer: object, what: str, make: Callable[[], Made]) -> Made:
        """Return what `make` computes for a layer from the weights alone. A block of many forwards computes it once."""
        return self._setting.once((what, id(layer)), make) if self._setting.steps else make()

    def costs(self, speed: DeviceSpeed | None = None) -> Costs:
        """Return the planner's costs, computed from the layers' shapes. Without `speed` they are those of a CPU."""
        matrices = [layer for layer in self.layers if layer.is_matrix]
        plain = sum(layer.weight.numel() for layer in matrices) or 1
        fuse, columns = [0.0] * self.experts, [0.0] * self.experts
        token = plain / (CPU_RATE if speed is None else speed.rate)
        for layer in matrices:
            for expert in range(len(layer.ranks)):
                fuse[expert] += layer.fuse_cost(expert) / plain * token
                columns[expert] += layer.row_cost(expert) / plain * token
        joint = sum(layer.joint_cost() for layer in matrices) / plain * token
        never = 0.0 if self.keeps_copies else math.inf
        found = Costs(tuple(fuse), CPU_REBUILD_TOKENS * token + never, tuple(columns), joint, token, mixes=self.mixes)
        if speed is None:
            return replace(found, batch=CPU_BATCH_TOKENS * token, step=CPU_STEP_TOKENS * token)
        written = sum(layer.weight.nbytes for layer in matrices)
        passed = sum((sum(layer.weight.shape) + max(layer.weight.shape)) * layer.weight.itemsize for layer in matrices)
        return replace(
            found,
            rebuild=2 * written / speed.bandwidth + never,
            plain=speed.plain,
            by_row=speed.by_row,
            fusion=FUSION_LAUNCHES * len(matrices) * speed.launch,
            moved=passed / speed.bandwidth,
        )

    def _entered(self, mode: Mode, weights: Tensor, bias_weights: Tensor, steps: bool = False) -> Setting:
        """Return the setting of a block: the weights on the model's device, and those on the CPU."""
        device = device_of(self.layers[0]) if self.layers else weights.device
        own = weights.to(device, non_blocking=True)
        biases = own if bias_weights is weights else bias_weights.to(device, non_blocking=True)
        return Setting(mode, own, biases, _known(weights), steps)

    @contextmanager
    def _running(self, setting: Setting) -> Iterator[None]:
        with self._lock:
            before, self._setting = self._setting, setting
            try:
                yield
            finally:
                self._setting = before

    def __getstate__(self) -> dict[str, Any]:
        """Leave out the lock, which can be neither copied nor pickled, and what is known of these very layers."""
        return {**{name: value for name, value in self.__dict__.items() if name != "_lock"}, "_stacks": {}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Take a state without a lock, and make a new one."""
        self.__dict__.update(state, _lock=threading.RLock())


class Setting:
    """The mode of one block, its weights, and what layers have computed from them for all of the block.

    `known` are the fusion weights on the CPU, or None where a router inside the model computes them on its device.
    `uses` says of each expert whether some row gives it a weight. Weights that are not known may use all.
    """

    def __init__(
        self,
        mode: Mode = "shared",
        weights: Tensor | None = None,
        bias_weights: Tensor | None = None,
        known: Tensor | None = None,
        steps: bool = False,
    ) -> None:
        self.mode: Mode = mode
        self.weights, self.bias_weights, self.known, self.steps = weights, bias_weights, known, steps
        experts = 0 if weights is None else weights.shape[-1]
        found = None if known is None else (known != 0)[None].flatten(0, -2).any(dim=0)
        self.uses: list[bool] = [True] * experts if found is None else found.tolist()
        self._made: dict[Hashable, Any] = {}
        self.waiting: dict[Any, Any] = {}

    def once(self, key: Hashable, make: Callable[[], Made]) -> Made:
        """Return what `make` returned when it was first asked for under this key. A compiled graph keeps nothing."""
        if torch.compiler.is_compiling():
            return make()
        if key not in self._made:
            self._made[key] = make()
        made: Made = self._made[key]
        return made


def _known(weights: Tensor) -> Tensor:
    """Return weights on the CPU. Only weights that are on another device make the caller wait for it."""
    return weights.detach().cpu()


class Columns(NamedTuple):
    """The indices of the columns in use (None for all), and their weights, (columns,) or a row of them each."""

    used: Tensor | None
    scale: Tensor


Watch = Callable[[Any, Tensor], None]
"""What is told of a call: a layer and its input."""
FUSION_LAUNCHES = 4
"""The operations that fusing one matrix takes, in units of the launches that are measured: a product starts slowly."""


class Together(Protocol):
    """Layers whose buffers lie together. `together` of a Fusion holds all that were found, `together_known` at last."""

    def forget(self) -> None:
        """Lay the layers' buffers together anew next time."""


class FusedLayer(Protocol):
    """The interface of a layer that Fusion controls."""

    weight: Tensor
    bias: Tensor | None
    ranks: tuple[int, ...]
    owner: Tensor
    is_matrix: bool
    fusible: ClassVar[bool]
    fused_weight: Tensor | None

    def fuse(self, weights: Tensor, bias_weights: Tensor) -> None:
        """Compute the weight and bias for the mode `fused`, for weights and bias weights (experts,)."""

    def fuse_cost(self, expert: int) -> float:
        """Return what adding an expert's matrix to the weight costs, in multiplications of a plain token."""

    def row_cost(self, expert: int) -> float:
        """Return the multiplications that an expert's matrix costs a token whose row has weights of its own."""

    def joint_cost(self) -> float:
        """Return an upper bound of the multiplications that a token's exclusive vectors cost, for any weights."""

"""How many bytes batches take, computed from shapes, and how many of their rows fit.

A twin holds the shared expert, the experts' factors and vectors, and once rows are fused, a fused copy of each matrix
that an expert changes. A batch takes activations, keys and values, and logits beside that. `Sizes` says what each of
these takes, and `Budget` what fits: the planner asks it (`twin_bench.twin.plan`).

What a batch takes is the largest sum of tensors that are there at one time. It is that of a block of the model, of the
logits of a forward, or of the last step of a generation. The shapes are those of transformers' models: the activations
of a block are four vectors of the hidden size, and the widest vectors of its feed-forward part.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np

from twin_bench.errors import InputError

LEAST_LENGTH = 64
"""The length of the shortest cache of compiled steps."""
EXACT = 4
"""The bytes of a number in which probabilities are computed."""


@dataclass(frozen=True)
class Sizes:
    """The bytes that a twin's model takes.

    - `held`: what is always there: parameters, factors and vectors.
    - `copy`: the fused copy of all weights; infinite where layers keep none.

    Of one token of a row:

    - `hidden`: a hidden state.
    - `block`, `by_row`: the activations of a block, plain and on the low-rank path.
    - `attention`: the activations of a block's attention, and `rotated` what rotary positions hold before it begins.
      On the low-rank path queries, keys and values are computed at once, and `together` is held beside them.
    - `mask`, `masked`, `scores`: of a pair of tokens. A batch that needs a mask has `mask` in its whole forward and
      `masked` in attention. Attention that writes its scores out has `scores`.
    - `cached`, `layer`: the keys and values of all layers, and of one. `repeated` is what attention makes of one
      layer's, where queries are grouped.
    - `logit`: a position's logits, as often as they are held. `exact` is one copy of them in float32.

    On the low-rank path:

    - `factors`, `kept_factors`: the factors of the experts in use, of the largest layer, and of all layers, which a
      generation keeps.
    - `mixed`, `kept_mixed`: of each row, its mixture of a joint basis, likewise.

    `encodes` says that an encoder reads a row, before keys and values are there.
    """

    held: int
    copy: float
    hidden: int
    block: int
    by_row: int
    attention: int
    rotated: int
    together: int
    mask: int
    masked: int
    scores: int
    cached: int
    layer: int
    repeated: int
    logit: int
    exact: int
    factors: int = 0
    mixed: int = 0
    kept_factors: int = 0
    kept_mixed: int = 0
    encodes: bool = False


class Use(NamedTuple):
    """What the batches of a list have in common.

    `steps` is the number of tokens to generate for each row, 0 for one forward. `logits` says that the logits of all
    steps are kept. `sequences` is how many sequences a row becomes, with beams or several texts. `prefix` is the number
    of tokens that were run before, for all rows of a batch. `compiled` is the largest number of rows of a batch whose
    steps are compiled, and 0 where none are: the cache then has a fixed length, and the rows are filled up. `shared`
    says that the shared expert alone runs, which needs no fused copy.
    """

    steps: int = 0
    logits: bool = False
    sequences: int = 1
    prefix: int = 0
    compiled: int = 0
    shared: bool = False


ONE_FORWARD = Use()


@dataclass(frozen=True)
class Budget:
    """What the batches of a list may take: `room` bytes beside `sizes.held`, the fused copy counted.

    `asked` is the number of each row's last positions whose logits are needed. None stands for one each.
    """

    sizes: Sizes
    room: float
    use: Use = ONE_FORWARD
    asked: Mapping[int, int] | None = None

    def positions(self, row: int) -> int:
        """Return the number of a row's positions whose logits are needed."""
        return 1 if self.asked is None else self.asked[row]

    def after(self, prefix: int) -> Budget:
        """Return the budget of rows whose first `prefix` tokens were run before."""
        return replace(self, use=self.use._replace(prefix=prefix))

    def before(self) -> Budget:
        """Return the budget of the pass that runs a prefix, and keeps its keys and values."""
        return replace(self, use=Use(steps=1, shared=self.use.shared))

    def needed(self, rows: Any, tokens: Any, positions: Any, *, fused: bool) -> Any:
        """Return the bytes that batches take, with the fused copy where `fused`. Each argument is a number or an array.

        Args:
            rows: how many rows a batch has.
            tokens: the length of its longest row, without a prefix that was run before.
            positions: the number of positions whose logits are computed, for every row.
            fused: whether the batch has fused weights.
        """
        rows, tokens, positions = np.asarray(rows), np.asarray(tokens), np.asarray(positions)
        sizes, use = self.sizes, self.use
        if use.compiled:
            rows = np.minimum(2 ** np.ceil(np.log2(np.maximum(rows, 1))), np.maximum(rows, use.compiled))
        rows = rows * use.sequences
        seen = tokens + use.prefix
        pairs = np.where((rows > 1) | (use.prefix > 0), tokens * seen, 0)  # a row alone needs no mask
        joined = seen * sizes.layer * (use.prefix > 0)
        attended = pairs * sizes.masked + tokens * seen * sizes.scores + joined
        attention = tokens * (sizes.attention + (0 if fused else sizes.together))
        attention = attention + np.maximum(attended, tokens * sizes.rotated)
        block = np.maximum(tokens * (sizes.block if fused else sizes.by_row), attention) + pairs * sizes.mask
        if use.steps:
            total = rows * self._generated(seen, block) + use.prefix * sizes.cached
        else:
            logits = positions * sizes.logit
            graded = positions * 2 * sizes.exact  # the probabilities of one row after the other
            total = rows * np.maximum(block, 3 * tokens * sizes.hidden + logits)
            total = np.maximum(total, rows * logits + graded) + use.prefix * sizes.cached
        if fused or use.shared:
            return total + (0 if use.shared else sizes.copy)
        lasting = use.steps > 0
        factors = sizes.kept_factors if lasting else sizes.factors
        return total + factors + rows * (sizes.kept_mixed if lasting else sizes.mixed)

    def _generated(self, tokens: Any, block: Any) -> Any:
        """Return the bytes of a row of `tokens` tokens that is generated from, whose first forward takes `block`."""
        sizes, use = self.sizes, self.use
        end = tokens + use.steps
        longest = _padded(end) if use.compiled else end
        begun = block if sizes.encodes else (longest if use.compiled else tokens) * sizes.cached + block
        kept = use.steps * sizes.exact if use.logits else 0
        step = np.maximum(end * (sizes.layer / 2 + sizes.repeated), sizes.logit + 3 * sizes.exact)
        return np.maximum(begun, longest * sizes.cached + step + kept)

    def fits(self, rows: Any, tokens: Any, positions: Any, *, fused: bool) -> Any:
        """Return whether batches fit. The arguments are those of `needed`."""
        return self.needed(rows, tokens, positions, fused=fused) <= self.room

    def most(self, tokens: Any, positions: Any, *, fused: bool) -> Any:
        """Return the largest numbers of rows that fit, of rows with so many tokens and positions. 0 is none."""
        two = self.needed(2, tokens, positions, fused=fused)
        four = self.needed(4, tokens, positions, fused=fused)
        with np.errstate(invalid="ignore"):  # a copy that is never made is infinite
            more = 2 + np.floor((self.room - two) / np.maximum((four - two) / 2, 1))
        return np.where(two <= self.room, more, self.fits(1, tokens, positions, fused=fused).astype(float))

    def crowded(self, rows: int, tokens: int, positions: int) -> bool:
        """Return whether a batch of the low-rank path fits only where the fused copy is freed."""
        return bool(self.needed(rows, tokens, positions, fused=False) + self.sizes.copy > self.room)

    def shares(self, prefix: int, tokens: int, positions: int, *, fused: bool) -> bool:
        """Return whether a prefix can be run before rows of `tokens` tokens more, and kept while they run."""
        return bool(
            self.before().fits(1, prefix, 0, fused=fused) and self.after(prefix).fits(1, tokens, positions, fused=fused)
        )

    def require(self, tokens: Any, positions: Any, rows: int = 1) -> None:
        """Raise an InputError unless each batch of `rows` rows of `tokens` tokens fits, fused or on the low-rank path.

        The arguments are numbers or arrays, as those of `needed`. The error names the batch that needs most.
        """
        every = np.minimum(*(self.needed(rows, tokens, positions, fused=way) for way in (True, False)))
        needed = float(every.max(initial=0))
        if needed <= self.room:
            return
        tokens = np.broadcast_to(tokens, every.shape).flat[every.argmax()]
        generated = f" and {self.use.steps} to generate" if self.use.steps else ""
        batch, fewer = ("one row", "") if rows == 1 else (f"a batch of {rows} rows", "fewer rows at once, ")
        raise InputError(
            f"{batch} of {tokens} tokens{generated} needs {gigabytes(needed)} beside the {gigabytes(self.sizes.held)} "
            f"of the twin, and {gigabytes(max(self.room, 0))} are left for it; use {fewer}a larger max_memory, a "
            "device with more memory, a smaller max_length, dtype=bfloat16 or quantization=4bit"
        )


def gigabytes(count: float) -> str:
    """Return a number of bytes in GB or MB, of 10^9 and of 10^6 bytes, as `max_memory` takes it."""
    return f"{count / 1e9:.3g} GB" if count >= 1e8 else f"{count / 1e6:.3g} MB"


def memory_limit(size: int | str | None, device_map: object = None) -> int | None:
    """Return a size in bytes, of a number of bytes or a text such as 40GB or 40GiB, in any case. None stays.

    InputError for anything else, and beside a device map, which needs a size for each device.
    """
    from accelerate.utils.modeling import convert_file_size_to_int

    if size is None:
        return None
    found = 0
    if isinstance(size, int | str) and not isinstance(size, bool):
        with contextlib.suppress(ValueError, OverflowError):
            # In capitals: accelerate reads GB that ends with a small letter as bits.
            found = int(size) if str(size).isdecimal() else convert_file_size_to_int(str(size).upper())
    if found <= 0:
        raise InputError(f"max_memory {size!r}: expected bytes, or a text such as 40GB or 40GiB")
    if device_map is not None:
        raise InputError(f"max_memory {size!r}: with device_map give a size for each device, such as {{0: '20GiB'}}")
    return int(found)


def padded_length(length: int) -> int:
    """Return the length of the cache of `length` tokens: few different ones, at most 64 or a quarter longer."""
    step = max(LEAST_LENGTH, 2 ** (length.bit_length() - 3))
    return -(-length // step) * step


def _padded(lengths: Any) -> Any:
    """Return the lengths of the caches of compiled steps."""
    return np.vectorize(lambda length: padded_length(int(length)), otypes=[float])(lengths)

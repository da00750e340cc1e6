"""Low-rank factors with 8 or 4 bits a number.

Both quantise a factor along its directions: the columns of B and the rows of A, which are stored as the rows of an
(r, k) matrix.

- 8 bits: each direction has a scale, its largest absolute value / 127, and its numbers are rounded to int8.
- 4 bits: NormalFloat4 of QLoRA (arXiv:2305.14314), the format of bitsandbytes' `quantize_4bit` with blocks of 64. The
  flattened matrix is cut into blocks of 64 numbers, and each block has a scale, its largest absolute value. A number
  becomes the nearest of 16 levels. Two levels share a byte, the first one in the high half.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from twin_bench.checkpoints.factors import Factors

BLOCK = 64
"""How many numbers share a scale in 4 bits."""
SCALE_BYTES = 4
"""Scales are float32."""
LARGEST = 127


@dataclass(frozen=True)
class QuantisedFactors:
    """Factors B (m, r) and A (r, n) with `bits` 8 or 4 a number.

    `parts` are the tensors that are stored: `B.codes`, `B.scales`, `A.codes` and `A.scales`. With 8 bits, codes are
    int8 (r, k) and scales float32 (r,). With 4 bits, codes are uint8 (ceil(r k / 2),) and scales (ceil(r k / 64),).
    """

    bits: int
    shape: tuple[int, int]
    rank: int
    parts: Mapping[str, Tensor]

    def factors(self) -> Factors:
        """Return what the codes stand for, in float32."""
        m, n = self.shape
        sides = {"B": m, "A": n}
        read = _read_8 if self.bits == 8 else _read_4
        B, A = (
            read(self.parts[f"{side}.codes"], self.parts[f"{side}.scales"], self.rank, length)
            for side, length in sides.items()
        )
        return Factors(B.T.contiguous(), A)


def quantised(factors: Factors, bits: int) -> QuantisedFactors:
    """Return factors B (m, r) and A (r, n) with 8 or 4 bits a number."""
    write = _write_8 if bits == 8 else _write_4
    parts: dict[str, Tensor] = {}
    for side, directions in (("B", factors.B.T), ("A", factors.A)):
        parts[f"{side}.codes"], parts[f"{side}.scales"] = write(directions.float().contiguous())
    return QuantisedFactors(bits, (len(factors.B), factors.A.shape[1]), len(factors.A), parts)


def direction_bytes(shape: tuple[int, int], bits: int | None) -> int:
    """Return the bytes of one direction of an (m, n) matrix's factors: with 4 bits at most so many, else exactly."""
    if bits is None:
        return 4 * sum(shape)
    if bits == 8:
        return sum(shape) + 2 * SCALE_BYTES
    return sum(-(-side // 2) + SCALE_BYTES * -(-side // BLOCK) for side in shape)


@functools.cache
def levels() -> Tensor:
    """Return the 16 levels of NormalFloat4, ascending from -1 to 1, 0 among them.

    They are means of neighbouring quantiles of the normal distribution, as QLoRA's equation 4 spaces them: 8 above 0
    and 7 below it.
    """
    tail = 0.9677083
    positive = torch.special.ndtri(torch.linspace(tail, 0.5, 9, dtype=torch.float64)[:-1])
    negative = -torch.special.ndtri(torch.linspace(tail, 0.5, 8, dtype=torch.float64)[:-1])
    both = torch.cat([positive, negative, torch.zeros(1, dtype=torch.float64)]).sort().values
    return (both / both.max()).float()


def _write_8(directions: Tensor) -> tuple[Tensor, Tensor]:
    scales = directions.abs().amax(dim=1) / LARGEST
    divisor = torch.where(scales > 0, scales, 1.0)
    return (directions / divisor[:, None]).round().clamp(-LARGEST, LARGEST).to(torch.int8), scales


def _read_8(codes: Tensor, scales: Tensor, rank: int, length: int) -> Tensor:
    return codes.view(rank, length).float() * scales[:, None]


def _write_4(directions: Tensor) -> tuple[Tensor, Tensor]:
    flat = directions.flatten()
    blocks = F.pad(flat, (0, -len(flat) % BLOCK)).view(-1, BLOCK)
    scales = blocks.abs().amax(dim=1)
    relative = blocks / torch.where(scales > 0, scales, 1.0)[:, None]
    between = (levels()[1:] + levels()[:-1]) / 2
    codes = torch.bucketize(relative.flatten()[: len(flat)], between).to(torch.uint8)
    pairs = F.pad(codes, (0, len(codes) % 2)).view(-1, 2)
    return pairs[:, 0] << 4 | pairs[:, 1], scales


def _read_4(codes: Tensor, scales: Tensor, rank: int, length: int) -> Tensor:
    pairs = torch.stack([codes >> 4, codes & 15], dim=1).flatten()[: rank * length]
    return (levels()[pairs.long()] * scales.repeat_interleave(BLOCK)[: rank * length]).view(rank, length)

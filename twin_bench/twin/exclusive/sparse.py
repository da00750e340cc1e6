"""Matrices of which single entries are kept, in the form in which they are stored."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Self

import numpy as np
import torch
from torch import Tensor

LARGEST_INDEX = 2**31


@dataclass(frozen=True)
class Sparse:
    """An (m, n) matrix with `count` entries, all others 0. `parts` are the tensors that are stored.

    Which entries are kept: `indices` (count,), int32, their positions in the flattened matrix in ascending order; or
    `mask`, one bit for each entry of the matrix. With neither, all are kept.
    Their values in that order: `values` (count,); or `signs`, one bit for each (1 is +), and `scale` (), their size.
    Bits are packed in uint8 tensors, entry 8 i + j in bit j of byte i.
    `starts` (m,), which is not stored, is how many entries are kept before each row: see `indexed`.
    """

    shape: tuple[int, int]
    count: int
    parts: Mapping[str, Tensor]

    @classmethod
    def of(cls, matrix: Tensor, kept: Tensor, scale: Tensor | None = None) -> Self:
        """Return the entries of `matrix` where `kept` is true, in the smallest form, on the CPU.

        Args:
            matrix: (m, n).
            kept: (m, n), bool.
            scale: the size of all entries, (). Then of the entries only their signs are stored.
        """
        flat, chosen = matrix.flatten(), kept.flatten()
        count = int(chosen.sum())
        values = flat[chosen]
        parts = {"values": values} if scale is None else {"signs": packed(values > 0), "scale": scale}
        if count < len(flat):
            few = 4 * count < -(-len(flat) // 8) and len(flat) <= LARGEST_INDEX
            parts |= {"indices": chosen.nonzero().squeeze(1).int()} if few else {"mask": packed(chosen)}
        m, n = matrix.shape
        return cls((m, n), count, {part: tensor.cpu() for part, tensor in parts.items()})

    def indexed(self) -> Sparse:
        """Return the same matrix with the part `starts`, which `rows` needs beside a mask."""
        if "mask" not in self.parts:
            return self
        each = unpacked(self.parts["mask"], self.shape[0] * self.shape[1]).view(self.shape).sum(dim=1)
        return Sparse(self.shape, self.count, {**self.parts, "starts": each.cumsum(dim=0) - each})

    def dense(self) -> Tensor:
        """Return the matrix (m, n) in the dtype of its values."""
        values, size = self._values(), self.shape[0] * self.shape[1]
        if "indices" in self.parts:
            values = values.new_zeros(size).index_copy_(0, self.parts["indices"].long(), values)
        elif "mask" in self.parts:
            values = values.new_zeros(size).masked_scatter_(unpacked(self.parts["mask"], size), values)
        return values.view(self.shape)

    def add_to(self, matrix: Tensor, weight: float) -> None:
        """Add weight times this matrix to `matrix` (m, n) in place."""
        if "indices" in self.parts:
            matrix.view(-1).index_add_(0, self.parts["indices"], self._values().to(matrix), alpha=weight)
        else:
            matrix.add_(self.dense().to(matrix), alpha=weight)

    def rows(self, ids: Tensor) -> Tensor:
        """Return the matrix's rows `ids` (k,) as (k, n). A matrix with a mask has to be `indexed`."""
        width = self.shape[1]
        places = ids[:, None] * width + torch.arange(width, device=ids.device)
        if "indices" in self.parts:
            indices = self.parts["indices"].long()
            order = torch.searchsorted(indices, places).clamp(max=self.count - 1)
            kept = indices[order] == places
        elif "mask" in self.parts:
            kept = bits_at(self.parts["mask"], places)
            order = (self.parts["starts"][ids][:, None] + kept.cumsum(dim=1) - 1).clamp(min=0)
        else:
            kept, order = torch.ones_like(places, dtype=torch.bool), places
        if "values" in self.parts:
            found = self.parts["values"][order]
        else:
            found = self._signed(bits_at(self.parts["signs"], order))
        return found.masked_fill(~kept, 0)

    def _values(self) -> Tensor:
        if "values" in self.parts:
            return self.parts["values"]
        signs = self.parts["signs"]
        each = self._signed(_bits(signs.device))
        return each.index_select(0, signs.int()).view(-1)[: self.count]

    def _signed(self, positive: Tensor) -> Tensor:
        scale = self.parts["scale"]
        return torch.where(positive, scale, -scale)


def packed(bits: Tensor) -> Tensor:
    """Return a flat bool tensor (k,) as bytes (ceil(k / 8),), uint8 on the CPU."""
    return torch.from_numpy(np.packbits(bits.cpu().numpy(), bitorder="little"))


def unpacked(packed_bits: Tensor, count: int) -> Tensor:
    """Return the first `count` bits as a bool tensor (count,)."""
    return _bits(packed_bits.device).index_select(0, packed_bits.int()).view(-1)[:count]


def bits_at(packed_bits: Tensor, places: Tensor) -> Tensor:
    """Return the bits at int64 `places`, a bool tensor of their shape."""
    return _bits(packed_bits.device)[packed_bits[places >> 3].long(), places & 7]


@functools.cache
def _bits(device: torch.device) -> Tensor:
    """Return the bits of each byte, (256, 8) bool. Looking them up is five times as fast as computing them."""
    return (torch.arange(256, device=device)[:, None] >> torch.arange(8, device=device) & 1).bool()

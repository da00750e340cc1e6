"""Encoded rows: token ids as tokenizers return them, packed into bytes, and told apart."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

Text = tuple[str, str | None]
Encoded = Mapping[str, list[int]]


def packed(ids: Sequence[int]) -> bytes:
    """Return tokens as bytes, 4 a token, whose order is that of the tokens: a key that takes little memory."""
    return np.array(ids, dtype=">u4").tobytes()


def identity(encoded: Encoded) -> bytes:
    """Return a key that is equal for two encoded rows if and only if they are the same input."""
    return packed([*encoded["input_ids"], *encoded.get("token_type_ids", ())])


def distinct(rows: Sequence[Encoded]) -> tuple[list[Encoded], Tensor]:
    """Return the distinct rows among encoded rows, and the place of each row among them, (rows,) int64.

    The distinct rows are sorted, so that not even the last bit of a result depends on the order of the rows.
    """
    keys = [identity(row) for row in rows]
    by_identity = dict(zip(keys, rows, strict=True))
    order = sorted(by_identity)
    place = {one: index for index, one in enumerate(order)}
    return [by_identity[one] for one in order], torch.tensor([place[key] for key in keys])

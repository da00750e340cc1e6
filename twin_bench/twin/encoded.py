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


def tokens(ids: Sequence[int]) -> Encoded:
    """Return token ids as an encoded row without padding."""
    return {"input_ids": list(ids), "attention_mask": [1] * len(ids)}


def identity(encoded: Encoded) -> bytes:
    """Return a key that is equal for two encoded rows if and only if they are the same input.

    It holds the ids and token types, 4 bytes each, then the mask, a byte each, if it leaves out a token, and last the
    number of ids. That number and the key's length tell which of these it holds, and where each begins.
    """
    ids = encoded["input_ids"]
    mask = np.array(encoded.get("attention_mask", ()), dtype=bool)
    return b"".join(
        (packed([*ids, *encoded.get("token_type_ids", ())]), b"" if mask.all() else mask.tobytes(), packed([len(ids)]))
    )


def alike(rows: Sequence[Encoded]) -> list[dict[str, list[int]]]:
    """Return rows as lists of ints that all have the inputs that one of them has, as a tokenizer pads them.

    A row without a mask is all tokens. One without token types has type 0.
    """
    names = dict.fromkeys(name for row in rows for name in row)
    return [
        {
            name: list(map(int, row[name])) if name in row else [int(name == "attention_mask")] * len(row["input_ids"])
            for name in names
        }
        for row in rows
    ]


def distinct(rows: Sequence[Encoded]) -> tuple[list[Encoded], Tensor]:
    """Return the distinct rows among encoded rows, and the place of each row among them, (rows,) int64.

    The distinct rows are sorted, so that not even the last bit of a result depends on the order of the rows.
    """
    keys = [identity(row) for row in rows]
    by_identity = dict(zip(keys, rows, strict=True))
    order = sorted(by_identity)
    place = {one: index for index, one in enumerate(order)}
    return [by_identity[one] for one in order], torch.tensor([place[key] for key in keys])


def last_tokens(ids: Sequence[int], window: int) -> list[int]:
    """Return the last tokens of a text as a list: no copy where `ids` is that list."""
    return ids if isinstance(ids, list) and len(ids) <= window else list(ids[-window:])

"""Tokenizers as they are written: what says where and how one was loaded is left out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

CIRCUMSTANCES = ("local_files_only", "is_local")
"""What transformers 5 writes of how a tokenizer was loaded: the first says whether HF_HUB_OFFLINE was set."""


def save_tokenizer(tokenizer: Any, folder: Path) -> None:
    """Write a tokenizer's files, the same ones however it was loaded."""
    for name in CIRCUMSTANCES:
        tokenizer.init_kwargs.pop(name, None)
    tokenizer.save_pretrained(folder)

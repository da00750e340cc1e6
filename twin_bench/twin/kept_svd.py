"""Truncated SVDs that are kept on disk: twins that differ in their router or in the bits of a number share them."""

from __future__ import annotations

import logging
from pathlib import Path

from torch import Tensor

from twin_bench.checkpoints.factors import Factors
from twin_bench.files import digest, digest_tensors, read_tensors, write_tensors
from twin_bench.merging.linear_algebra import truncated_svd
from twin_bench.twin.cache import surroundings

FORMAT = 2
"""The version of kept SVDs. It is raised with every change in how `truncated_svd` computes."""

_log = logging.getLogger(__name__)


def kept_svd(folder: Path, matrix: Tensor, rank: int, *, seed: int) -> Factors:
    """Return `truncated_svd` of an (m, n) matrix, from `folder` if an equal matrix was decomposed before.

    The key is a digest of the matrix's values and of what else decides the result: rank, seed, versions, device and
    threads. So a kept result is bit for bit what would be computed.
    """
    decisive = {"format": FORMAT, "rank": rank, "seed": seed, "matrix": digest_tensors({"": matrix})}
    file = folder / f"{digest({**decisive, **surroundings(matrix.device)})}.safetensors"
    stored = read_tensors(file, format_number=FORMAT)
    if stored is not None:
        return Factors(stored["B"].to(matrix.device), stored["A"].to(matrix.device))
    B, A = truncated_svd(matrix, rank, seed=seed)
    try:
        write_tensors(file, {"B": B.cpu(), "A": A.cpu()}, format_number=FORMAT)
    except OSError as error:
        _log.warning("%s: the SVD can't be kept (%s)", file, error)
    return Factors(B, A)

"""TSV-C against numpy's SVD, and what it stores against a count of factors."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import twin_bench
from tests.support.matrices import MATRICES, SHAPES, assert_moved, deltas, random_experts
from twin_bench import InputError
from twin_bench.merging.methods.tsv_c import stored_bytes


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("count", "rank"), [(2, None), (3, None), (3, 9)])
@pytest.mark.parametrize("row", [0, 1])
def test_keeps_the_tasks_leading_triplets(row: int, count: int, rank: int | None, dtype: torch.dtype) -> None:
    base, experts = random_experts(count, rank=rank, dtype=dtype)
    merged = twin_bench.merge("tsv_c", base, experts, task=f"task{row}")
    for name in MATRICES:
        U, S, Vh = np.linalg.svd(deltas(base, experts, name)[row])
        kept = min(SHAPES[name]) // count
        assert_moved(merged[name], base[name], sum(S[k] * np.outer(U[:, k], Vh[k]) for k in range(kept)))
    for name in SHAPES.keys() - set(MATRICES):
        torch.testing.assert_close(merged[name], experts[f"task{row}"][name])


def test_lora_experts_come_back_where_there_is_room_for_their_rank() -> None:
    base, experts = random_experts(3, rank=3)
    for task, expert in experts.items():
        for name, found in twin_bench.merge("tsv_c", base, experts, task=task).items():
            torch.testing.assert_close(found, expert[name], rtol=1e-4, atol=1e-5)


def test_an_expert_that_changed_nothing_is_the_base() -> None:
    base, experts = random_experts(2)
    found = twin_bench.merge("tsv_c", base, {**experts, "idle": base}, task="idle")
    assert all(torch.equal(found[name], base[name]) for name in base)


def test_what_it_stores() -> None:
    """Of (40, 8) with four experts each keeps two columns of 40 and of 8; a vector of 5 is kept whole."""
    shapes = [torch.Size((40, 8)), torch.Size((5,))]
    assert stored_bytes(shapes, 4, 2) == 2 * (325 + 4 * (2 * 48 + 5))
    assert stored_bytes(shapes, 1, 4) == 4 * (325 + 325)  # eight columns of each side are more than the matrix


def test_a_task_must_be_named() -> None:
    base, experts = random_experts(2)
    with pytest.raises(InputError, match="tsv_c has one set of parameters for each task: name the task with task="):
        twin_bench.merge("tsv_c", base, experts)

"""Task vectors: their values, and the memory of those that are 0."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from twin_bench.errors import InputError
from twin_bench.merging.task_vectors import TaskVectors

STATUS = Path("/proc/self/status")


def anonymous() -> int:
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith("RssAnon"))
    return 1024 * int(line.split()[1])


@pytest.mark.skipif(not STATUS.exists(), reason="the kernel's counters are Linux's")
def test_a_parameter_that_no_expert_changes_takes_no_memory() -> None:
    """As the embeddings of eight adapters: their stack would be eight tables in float32."""
    base = torch.randn(2**18, 8, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    vectors = TaskVectors({"w": base}, {str(i): {"w": base.clone()} for i in range(8)})
    before = anonymous()
    found = vectors["w"]
    taken = anonymous() - before
    assert taken < base.nbytes  # a float32 stack takes 16 times that
    assert found.shape == (8, *base.shape)
    assert found.dtype == torch.float32
    assert not found.any()
    found += 1  # a method may change it in place
    assert bool((found == 1).all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_vectors_are_the_differences_whoever_changes_first(dtype: torch.dtype) -> None:
    base = torch.randn(6, 5, generator=torch.Generator().manual_seed(1)).to(dtype)
    changed = base + 1
    for order in ((base, base, changed), (changed, base, base), (base, base.float(), changed)):
        found = TaskVectors({"w": base}, {str(i): {"w": w} for i, w in enumerate(order)})["w"]
        assert torch.equal(found, torch.stack([w.float() - base.float() for w in order]))


def test_a_base_that_is_not_finite_is_told_although_all_experts_share_it() -> None:
    base = torch.tensor([1.0, torch.inf])
    with pytest.raises(InputError, match="base model: tensor w holds NaN or inf"):
        TaskVectors({"w": base}, {"a": {"w": base}})["w"]

"""Merges on another device than the weights': no operation mixes devices, and the answers are the CPU's."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.support.merges import EXPERTS, models
from tests.support.pretend_device import DEVICE, pretended
from twin_bench.merging.by_name import merge_lazily
from twin_bench.merging.device import exact_device
from twin_bench.merging.registry import MergeMethod, methods

MERGES = sorted(name for name, method in methods().items() if isinstance(method, MergeMethod))


def inputs(method: MergeMethod, base: Any, tuned: Any) -> dict[str, Any]:
    """Return what a method takes beside weights."""
    kinds: dict[Any, Any] = {
        "fisher": {name: torch.rand_like(tensor) for name, tensor in base.items()},
        "gram": {name: torch.cov(torch.randn(t.shape[1], 90)) for name, t in base.items() if t.ndim == 2},
    }
    known = {"task": next(iter(tuned)), "statistics": dict.fromkeys(tuned, kinds.get(method.statistics))}
    return {name: known[name] for name in method.inputs}


@pytest.mark.parametrize("name", MERGES)
def test_a_merge_on_a_device_is_the_merge_on_the_cpu(name: str) -> None:
    torch.manual_seed(0)
    base, tuned = models(experts=EXPERTS.get(name, 4))
    method = methods()[name]
    assert isinstance(method, MergeMethod)
    given = inputs(method, base, tuned)
    expected = dict(merge_lazily(name, base, tuned, **given).items())
    with pretended():
        found = dict(merge_lazily(name, base, tuned, device=DEVICE, **given).items())
    for key, tensor in expected.items():
        assert type(found[key]) is torch.Tensor
        torch.testing.assert_close(found[key], tensor, rtol=1e-6, atol=1e-7)


def test_a_device_without_float64_leaves_merges_to_the_cpu() -> None:
    assert exact_device("mps").type == "cpu"
    assert exact_device("cuda:1") == torch.device("cuda", 1)

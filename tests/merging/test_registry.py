"""Merge methods against second implementations: formulas written out, and peft's merge utilities."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch
from peft.utils import merge_utils
from torch import Tensor

import twin_bench
from tests.support.merges import EXPERTS, STATIC, models
from twin_bench import InputError
from twin_bench.merging.by_name import merge_lazily
from twin_bench.merging.registry import find_method


def task_vectors(base: Mapping[str, Tensor], tuned: Mapping[str, Mapping[str, Tensor]], name: str) -> Tensor:
    return torch.stack([expert[name].double() - base[name].double() for expert in tuned.values()])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_average_and_task_arithmetic(dtype: torch.dtype) -> None:
    base, tuned = models(dtype)
    averaged = twin_bench.merge("average", base, tuned)
    summed = twin_bench.merge("task_arithmetic", base, tuned, scaling=0.37)
    for name in base:
        mean = torch.stack([expert[name].double() for expert in tuned.values()]).mean(dim=0)
        expected = base[name].double() + 0.37 * task_vectors(base, tuned, name).sum(dim=0)
        for found, reference in ((averaged[name], mean), (summed[name], expected)):
            assert found.dtype is dtype
            tolerance = {"rtol": 1e-2, "atol": 1e-2} if dtype is torch.bfloat16 else {"rtol": 1e-5, "atol": 1e-6}
            torch.testing.assert_close(found.double(), reference, **tolerance)


def test_task_arithmetic_is_pefts() -> None:
    base, tuned = models()
    for name in base:
        taus = list(task_vectors(base, tuned, name).float())
        expected = base[name] + merge_utils.task_arithmetic(taus, torch.full((4,), 0.3))
        torch.testing.assert_close(twin_bench.merge("task_arithmetic", base, tuned)[name], expected)


@pytest.mark.parametrize("density", [0.05, 0.2, 0.7, 1.0])
def test_ties_is_pefts_on_a_model_of_one_tensor(density: float) -> None:
    base, tuned = models()
    for name in ("tall", "wide", "square"):
        one_base = {name: base[name]}
        one_tuned = {task: {name: expert[name]} for task, expert in tuned.items()}
        taus = [expert[name] - base[name] for expert in tuned.values()]
        expected = base[name] + 0.7 * merge_utils.ties(taus, torch.ones(4), density)
        found = twin_bench.merge("ties", one_base, one_tuned, density=density, scaling=0.7)[name]
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_ties_trims_over_the_whole_model() -> None:
    """The paper's TIES, written out over one flat vector an expert; a tensor of small entries loses them all."""
    base, tuned = models()
    for expert in tuned.values():
        expert["square"] = base["square"] + 1e-3 * (expert["square"] - base["square"])
    flat = torch.stack([torch.cat([(e[n] - base[n]).flatten() for n in base]) for e in tuned.values()])
    keep = int(0.2 * flat.shape[1])
    for row in flat:
        row[row.abs() < row.abs().sort(descending=True).values[keep - 1]] = 0
    elected = flat.sum(dim=0).sign()
    chosen = torch.where(flat.sign() == elected, flat, 0)
    expected = chosen.sum(dim=0) / (chosen != 0).sum(dim=0).clamp(min=1)
    merged = twin_bench.merge("ties", base, tuned)
    found = torch.cat([(merged[name] - base[name]).flatten() for name in base])
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)
    assert torch.equal(merged["square"], base["square"])


@pytest.mark.parametrize("name", STATIC)
def test_invariances(name: str) -> None:
    base, tuned = models(experts=EXPERTS[name])
    merged = twin_bench.merge(name, base, tuned)
    assert merged.keys() == base.keys()
    backwards = {task: tuned[task] for task in reversed(tuned)}
    for tensor, other in twin_bench.merge(name, base, backwards).items():
        torch.testing.assert_close(other, merged[tensor], rtol=1e-4, atol=1e-6)
    again = twin_bench.merge(name, base, tuned)
    assert all(torch.equal(again[tensor], merged[tensor]) for tensor in base)
    unchanged = twin_bench.merge(name, base, {"a": base, "b": base})
    assert all(torch.equal(unchanged[tensor], base[tensor]) for tensor in base)


@pytest.mark.parametrize("name", ["average", "task_arithmetic", "ties"])
def test_one_expert_at_scale_one_comes_back(name: str) -> None:
    base, tuned = models(experts=1)
    options = {"average": {}, "task_arithmetic": {"scaling": 1.0}, "ties": {"scaling": 1.0, "density": 1.0}}[name]
    for tensor, found in twin_bench.merge(name, base, tuned, **options).items():
        torch.testing.assert_close(found, tuned["task0"][tensor])


def test_untouched_parameters_and_integers_stay_bit_for_bit() -> None:
    base, tuned = models()
    base["position_ids"] = torch.arange(5)
    for expert in tuned.values():
        expert["position_ids"] = torch.arange(5)
        expert["tall"] = base["tall"].clone()
    for name in STATIC:
        merged = twin_bench.merge(name, base, dict(list(tuned.items())[: EXPERTS[name]]))
        assert torch.equal(merged["tall"], base["tall"])
        assert torch.equal(merged["position_ids"], base["position_ids"])


@pytest.mark.parametrize("positions", [torch.arange(6), torch.arange(20), torch.arange(12, dtype=torch.int32)])
def test_a_buffer_of_integers_may_be_longer_or_shorter(positions: Tensor) -> None:
    base, tuned = models(experts=1)
    base["position_ids"] = torch.arange(12)[None]
    tuned["task0"]["position_ids"] = positions[None]
    merged = twin_bench.merge("average", base, tuned)
    assert torch.equal(merged["position_ids"], base["position_ids"])
    for other in (positions[None] + 1, positions, positions.repeat(2, 1)):
        tuned["task0"]["position_ids"] = other
        with pytest.raises(InputError, match="'task0': the values of tensor position_ids differ from the base model's"):
            twin_bench.merge("average", base, tuned)


def test_merging_is_lazy() -> None:
    base, tuned = models()
    read: list[str] = []

    class Watched(dict[str, Tensor]):
        def __getitem__(self, name: str) -> Tensor:
            read.append(name)
            return super().__getitem__(name)

    merged = merge_lazily("average", base, {task: Watched(expert) for task, expert in tuned.items()})
    assert read == []
    _ = merged["vector"]
    assert set(read) == {"vector"}


@pytest.mark.parametrize("name", ["average", "ties", "dare_ties"])
def test_live_parameters_merge_as_their_values_do(name: str) -> None:
    base, tuned = models()
    live = {task: {n: torch.nn.Parameter(tensor) for n, tensor in expert.items()} for task, expert in tuned.items()}
    expected = twin_bench.merge(name, base, tuned)
    merged = twin_bench.merge(name, {n: torch.nn.Parameter(tensor) for n, tensor in base.items()}, live)
    assert all(torch.equal(merged[tensor], expected[tensor]) for tensor in base)
    assert not any(tensor.requires_grad for tensor in merged.values())


def test_errors() -> None:
    base, tuned = models()
    with pytest.raises(InputError, match="did you mean 'ties'"):
        twin_bench.merge("tis", base, tuned)
    with pytest.raises(InputError, match="no option 'scale'; did you mean 'scaling'"):
        twin_bench.merge("ties", base, tuned, scale=1.0)
    for density in (0.0, 1.5, -1.0):
        with pytest.raises(InputError, match=r"density must be in \(0, 1\]"):
            twin_bench.merge("ties", base, tuned, density=density)
        with pytest.raises(InputError, match=r"density must be in \(0, 1\]"):
            twin_bench.merge("dare_ties", base, tuned, density=density)
    with pytest.raises(InputError, match="no expert to merge"):
        twin_bench.merge("average", base, {})
    with pytest.raises(InputError, match="twin-bench build"):
        twin_bench.merge("twin", base, tuned)
    short = {**tuned, "odd": {**tuned["task0"], "tall": torch.zeros(39, 7)}}
    with pytest.raises(
        InputError, match=r"'odd': tensor tall is \(39, 7\), the base model's is \(40, 7\).*backbone only"
    ):
        twin_bench.merge("average", base, short)
    lacking = {**tuned, "odd": {"tall": base["tall"]}}
    with pytest.raises(InputError, match="expert 'odd' has no tensor"):
        twin_bench.merge("average", base, lacking)
    broken = {**tuned, "odd": {**tuned["task0"], "wide": torch.full((5, 33), torch.nan)}}
    with pytest.raises(InputError, match="odd: tensor wide holds NaN or inf"):
        twin_bench.merge("average", base, broken)


def test_headers_say_what_a_catalogue_needs() -> None:
    for name, method in twin_bench.methods().items():
        assert method.name == name
        assert method.title
        assert method.track == "bound" or method.paper.startswith("arXiv:")
        assert method.tune.keys() <= method.defaults.keys()
    assert find_method("task_arithmetic").defaults == {"scaling": 0.3}
    assert "seed" in find_method("dare_ties").needs

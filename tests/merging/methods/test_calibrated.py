"""Fisher merging and RegMean against their formulas, written out one entry and one regression at a time."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from scipy.linalg import lstsq, null_space

import twin_bench
from tests.support.merges import models
from twin_bench import InputError

MATRICES = ("tall", "wide", "square", "deficient")
TOLERANCE = {torch.float32: {"rtol": 1e-4, "atol": 1e-5}, torch.bfloat16: {"rtol": 1e-2, "atol": 1e-2}}


def diagonals(tuned: Any, seed: int = 0) -> dict[str, dict[str, torch.Tensor]]:
    """Fishers of very different sizes a task, with zeros among them."""
    generator = torch.Generator().manual_seed(seed)
    return {
        task: {n: 10.0**-power * torch.rand(x.shape, generator=generator).sub(0.2).clamp(min=0) for n, x in e.items()}
        for power, (task, e) in enumerate(tuned.items())
    }


def inputs(tuned: Any, count: int = 60, seed: int = 0) -> dict[str, dict[str, torch.Tensor]]:
    """Correlated inputs X (count, in) of every matrix as a linear layer, of another scale for each task."""
    generator = torch.Generator().manual_seed(seed)
    drawn: dict[str, dict[str, torch.Tensor]] = {}
    for scale, (task, expert) in enumerate(tuned.items(), start=1):
        drawn[task] = {}
        for name in MATRICES:
            width = expert[name].shape[1]
            mixing = torch.randn(width, width, generator=generator)
            drawn[task][name] = scale * torch.randn(count, width, generator=generator) @ mixing
    return drawn


def grams(inputs: Any) -> dict[str, dict[str, torch.Tensor]]:
    return {task: {name: x.T @ x for name, x in own.items()} for task, own in inputs.items()}


@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("floor", [1e-6, 1e-2])
def test_fisher_is_the_weighted_average_of_the_experts(dtype: torch.dtype, floor: float) -> None:
    base, tuned = models(dtype)
    statistics = diagonals(tuned)
    merged = twin_bench.merge("fisher", base, tuned, statistics=statistics, floor=floor)
    flat = {t: torch.cat([own[n].double().flatten() for n in base]) for t, own in statistics.items()}
    weights = {t: (f + floor) / (f.square().sum().sqrt() + floor) for t, f in flat.items()}
    experts = {t: torch.cat([e[n].double().flatten() for n in base]) for t, e in tuned.items()}
    expected = sum(weights[t] * experts[t] for t in tuned) / sum(weights.values())
    found = torch.cat([merged[name].double().flatten() for name in base])
    torch.testing.assert_close(found, expected, **TOLERANCE[dtype])
    assert {tensor.dtype for tensor in merged.values()} == {dtype}


def test_fisher_takes_a_parameter_from_the_expert_that_alone_has_information_on_it() -> None:
    base, tuned = models()
    owners = dict(zip(MATRICES, tuned, strict=True))
    statistics = {
        task: {name: torch.full_like(x, float(owners.get(name) == task)) for name, x in base.items()} for task in tuned
    }
    merged = twin_bench.merge("fisher", base, tuned, statistics=statistics, floor=1e-9)
    for name, owner in owners.items():
        torch.testing.assert_close(merged[name], tuned[owner][name])


@pytest.mark.parametrize("alpha", [0.3, 0.9, 1.0])
@pytest.mark.parametrize("dtype", list(TOLERANCE))
def test_regmean_is_its_formula(dtype: torch.dtype, alpha: float) -> None:
    base, tuned = models(dtype)
    statistics = grams(inputs(tuned))
    merged = twin_bench.merge("regmean", base, tuned, statistics=statistics, alpha=alpha)
    for name in MATRICES:
        reduced = {}
        for task, own in statistics.items():
            reduced[task] = alpha * own[name].double() + (1 - alpha) * torch.diag(own[name].double().diagonal())
        products = sum(reduced[task] @ expert[name].double().T for task, expert in tuned.items())
        expected = torch.linalg.solve(sum(reduced.values()), products).T
        torch.testing.assert_close(merged[name].double(), expected, **TOLERANCE[dtype])
    mean = torch.stack([expert["vector"].double() for expert in tuned.values()]).mean(dim=0)
    torch.testing.assert_close(merged["vector"].double(), mean, **TOLERANCE[dtype])


def test_regmean_at_alpha_one_is_the_joint_least_squares_solution() -> None:
    base, tuned = models()
    drawn = inputs(tuned)
    merged = twin_bench.merge("regmean", base, tuned, statistics=grams(drawn), alpha=1.0)
    for name in MATRICES:
        rows = torch.cat([drawn[task][name].double() for task in tuned])
        targets = torch.cat([drawn[task][name].double() @ tuned[task][name].double().T for task in tuned])
        expected = torch.from_numpy(lstsq(rows.numpy(), targets.numpy())[0]).T
        torch.testing.assert_close(merged[name].double(), expected, rtol=1e-3, atol=1e-4)


def test_regmean_of_weights_stored_in_out_is_the_transpose() -> None:
    base, tuned = models()
    statistics = grams(inputs(tuned))
    merged = twin_bench.merge("regmean", base, tuned, statistics=statistics)
    turned = {task: {name: tensor.t().contiguous() for name, tensor in e.items()} for task, e in tuned.items()}
    named = {task: {f"{name}.T": gram for name, gram in own.items()} for task, own in statistics.items()}
    found = twin_bench.merge("regmean", {n: x.t().contiguous() for n, x in base.items()}, turned, statistics=named)
    for name in base:
        torch.testing.assert_close(found[name], merged[name].t(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("alpha", "count"), [(1.0, 3), (0.9, 3), (0.9, 60)])
def test_a_singular_gram_matrix_leaves_the_mean_where_no_input_reaches(alpha: float, count: int) -> None:
    """Four tasks' `count` inputs each, the first three features always 0: outputs are fitted, the rest is the mean."""
    base, tuned = models()
    drawn = inputs(tuned, count)
    for own in drawn.values():
        for x in own.values():
            x[:, :3] = 0
    merged = twin_bench.merge("regmean", base, tuned, statistics=grams(drawn), alpha=alpha)
    mean = twin_bench.merge("average", base, tuned)
    for name in MATRICES:
        assert merged[name].isfinite().all()
        torch.testing.assert_close(merged[name][:, :3], mean[name][:, :3])
        assert not torch.allclose(merged[name][:, 3:], mean[name][:, 3:])


def test_a_rank_deficient_regression_is_solved_exactly_and_the_rest_is_the_mean() -> None:
    """Fewer inputs than features: there are weights with every expert's own outputs, and these are such."""
    base, tuned = models()
    drawn = inputs(tuned, count=1)
    merged = twin_bench.merge("regmean", base, tuned, statistics=grams(drawn), alpha=1.0)
    mean = twin_bench.merge("average", base, tuned)
    for name in ("tall", "wide", "square"):
        for task, own in drawn.items():
            expected = own[name] @ tuned[task][name].T
            torch.testing.assert_close(own[name] @ merged[name].T, expected, rtol=1e-3, atol=1e-3)
        rows = torch.cat([own[name].double() for own in drawn.values()])
        deviation = rows.square().sum(dim=0).sqrt()
        unreached = torch.from_numpy(null_space((rows / deviation).numpy()))
        assert unreached.shape[1] == rows.shape[1] - 4
        moved = ((merged[name] - mean[name]) * deviation) @ unreached
        torch.testing.assert_close(moved, torch.zeros_like(moved), rtol=0, atol=1e-5)


@pytest.mark.parametrize(("method", "make"), [("fisher", diagonals), ("regmean", lambda tuned: grams(inputs(tuned)))])
def test_invariances(method: str, make: Any) -> None:
    base, tuned = models()
    statistics = make(tuned)
    for expert in tuned.values():
        expert["square"] = base["square"].clone()
    base["positions"] = torch.arange(4)
    merged = twin_bench.merge(method, base, tuned, statistics=statistics)
    assert merged.keys() == base.keys()
    for name in ("square", "positions"):
        assert torch.equal(merged[name], base[name])
    backwards = {task: tuned[task] for task in ("task3", "task1", "task2", "task0")}
    for name, other in twin_bench.merge(method, base, backwards, statistics=statistics).items():
        torch.testing.assert_close(other, merged[name], rtol=1e-4, atol=1e-6)
    del base["positions"]
    for experts in ({"task0": tuned["task2"]}, dict.fromkeys(tuned, tuned["task2"])):
        for name, found in twin_bench.merge(method, base, experts, statistics=statistics).items():
            torch.testing.assert_close(found, tuned["task2"][name], rtol=1e-5, atol=1e-6)
    for name, found in twin_bench.merge(method, base, dict.fromkeys(tuned, base), statistics=statistics).items():
        assert torch.equal(found, base[name])


@pytest.mark.parametrize(("method", "make"), [("fisher", diagonals), ("regmean", lambda tuned: grams(inputs(tuned)))])
def test_errors(method: str, make: Any) -> None:
    base, tuned = models()
    statistics = make(tuned)
    with pytest.raises(InputError, match=f"{method} needs statistics of training inputs, and those of expert 'task0'"):
        twin_bench.merge(method, base, tuned)
    with pytest.raises(InputError, match="those of expert 'task3' are missing"):
        twin_bench.merge(method, base, tuned, statistics={t: statistics[t] for t in ("task0", "task1", "task2")})
    without = {name: x for name, x in statistics["task1"].items() if name != "wide"}
    with pytest.raises(InputError, match="the statistics of expert 'task1' have no wide"):
        twin_bench.merge(method, base, tuned, statistics={**statistics, "task1": without})
    other = {**statistics["task1"], "wide": torch.ones(2, 2)}
    with pytest.raises(InputError, match=r"expert 'task1' have wide as \(2, 2\), not \("):
        twin_bench.merge(method, base, tuned, statistics={**statistics, "task1": other})
    broken = {**statistics["task1"], "wide": statistics["task1"]["wide"] * torch.nan}
    with pytest.raises(InputError, match="statistics of expert 'task1': tensor wide holds NaN or inf"):
        twin_bench.merge(method, base, tuned, statistics={**statistics, "task1": broken})
    with pytest.raises(InputError, match="average has no option 'statistics'"):
        twin_bench.merge("average", base, tuned, statistics=statistics)


def test_options_out_of_range() -> None:
    base, tuned = models()
    with pytest.raises(InputError, match=r"regmean: alpha must be in \(0, 1\]"):
        twin_bench.merge("regmean", base, tuned, statistics=grams(inputs(tuned)), alpha=1.5)
    with pytest.raises(InputError, match="fisher: floor must be above 0"):
        twin_bench.merge("fisher", base, tuned, statistics=diagonals(tuned), floor=0.0)
    negative = {task: {name: -x for name, x in own.items()} for task, own in diagonals(tuned).items()}
    with pytest.raises(InputError, match="hold a negative number"):
        twin_bench.merge("fisher", base, tuned, statistics=negative)

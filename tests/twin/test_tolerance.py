"""Tolerance: what simpler weights may change, against the logits themselves."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from twin_bench import InputError
from twin_bench.twin.tolerance import allowed_tolerance, sensitivity, simplified


def test_weights_change_by_no_more_than_they_may_and_are_as_simple_as_can_be() -> None:
    generator = torch.Generator().manual_seed(0)
    weights = torch.softmax(6 * torch.randn(300, 5, generator=generator), dim=1)
    for change in (1e-4, 1e-2, 0.3):
        simple = simplified(weights, change)
        moved = (simple.double() - weights.double()).abs().sum(dim=1)
        assert moved.max() <= change * (1 + 1e-6)
        for row, (before, after) in enumerate(zip(weights.tolist(), simple.tolist(), strict=True)):
            if 2 * (1 - max(before)) <= change * 0.999:
                assert sorted(after) == [0, 0, 0, 0, 1], row
                continue
            # No larger set of weights could have been left out: all subsets, tried.
            fits = [
                size
                for size in range(5)
                for left_out in itertools.combinations(before, size)
                if sum(left_out) <= change * 0.999
            ]
            assert after.count(0.0) >= max(fits), row
            assert set(after) - {0.0} <= set(before)


def test_no_tolerance_changes_nothing() -> None:
    weights = torch.softmax(torch.randn(9, 4, generator=torch.Generator().manual_seed(0)), dim=1)
    assert simplified(weights, 0.0) is weights
    one_hot = torch.eye(4)
    assert torch.equal(simplified(one_hot, 0.1), one_hot)


def test_weights_that_rounding_takes_away_are_zeros_by_default() -> None:
    """The sensitivities of real twins were 2 and 3. Six rounding units of a logit are no rounding."""
    expert = torch.full((1, 8), 1e-9)
    expert[0, 5] = 1.0
    allowed = allowed_tolerance(None, "standard", torch.float32, 3.1, 8)
    assert 0 < allowed <= torch.finfo(torch.float32).eps / 2
    assert simplified(expert, allowed / 3.1).tolist() == [[0, 0, 0, 0, 0, 1, 0, 0]]
    seen = expert.masked_fill(expert < 1, 1e-7)
    assert simplified(seen, allowed / 3.1).count_nonzero() == 8
    assert allowed_tolerance(0.0, "standard", torch.float32, 3.1, 8) == 0
    assert allowed_tolerance(None, "standard", torch.float32, None, 8) == 0
    assert allowed_tolerance(None, "paper", torch.float32, 3.1, 8) == 0


def test_a_row_keeps_its_largest_weight() -> None:
    assert simplified(torch.tensor([[0.3, 0.3, 0.4]]), 1.0).tolist() == [[0, 0, pytest.approx(0.4)]]
    assert simplified(torch.tensor([[0.0, 0.0005]]), 0.001).tolist() == [[0, pytest.approx(0.0005)]]
    assert simplified(torch.zeros(1, 3), 5.0).tolist() == [[0, 0, 0]]


class LinearTwin:
    """Logits that are linear in the weights, so that what they move by is known."""

    expert_names = ("a", "b", "c")
    matrix = torch.tensor([[1.0, 0.0], [0.0, -4.0], [2.0, 1.0]])  # (experts, logits)

    def probe(self, encoded: list[dict[str, list[int]]], tasks: list[str], weights: Tensor) -> list[Tensor]:
        return [
            row["input_ids"][0] * (torch.tensor([10.0, 0.0]) + own @ self.matrix)
            for row, own in zip(encoded, weights, strict=True)
        ]


def test_sensitivity_is_the_largest_derivative_over_the_logits_size() -> None:
    """Row n has n times the logits: expert b moves one by 4 n, and the largest is n (10 + w_a + 2 w_c)."""
    rows = [{"input_ids": [n]} for n in (1, 3, 2)]
    weights = torch.tensor([[1.0, 0, 0], [0, 0, 1.0], [0, 1.0, 0]])
    found = sensitivity(LinearTwin(), rows, ["x", "x", "y"], weights)
    of_x = ((4**2 + 12**2) / (11**2 + 36**2)) ** 0.5
    assert found == pytest.approx(max(of_x, 8 / 20), rel=1e-4)


def test_errors(families, tmp_path) -> None:  # type: ignore[no-untyped-def]
    from twin_bench import TwinModel
    from twin_bench.twin.builder import build_twin
    from twin_bench.twin.recipe import Recipe

    family = families("bert")
    build_twin(Recipe.model_validate({**family.recipe, "router": None}), tmp_path / "twin")
    with pytest.raises(InputError, match="tolerance -1: a fraction"):
        TwinModel.from_pretrained(tmp_path / "twin", tolerance=-1)
    with pytest.raises(InputError, match="does not say how sensitive it is"):
        TwinModel.from_pretrained(tmp_path / "twin", tolerance=1e-3)
    assert TwinModel.from_pretrained(tmp_path / "twin", dtype="bfloat16").tolerance == 0

"""DARE's statistics, peft's DARE + TIES on the same draw, and draws that another process repeats."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from peft.utils import merge_utils

import twin_bench
from tests.support.interpreter import python, side_by_side
from tests.support.merges import models


def test_dare_keeps_a_fraction_and_rescales_it() -> None:
    base = {"w": torch.zeros(400, 250)}
    tuned = {"a": {"w": torch.full((400, 250), 0.3)}}
    delta = twin_bench.merge("dare_task_arithmetic", base, tuned, scaling=1.0, density=0.25, seed=1)["w"]
    assert sorted(delta.unique().tolist()) == pytest.approx([0.0, 1.2])
    kept = (delta != 0).float().mean().item()
    assert abs(kept - 0.25) < 5 * (0.25 * 0.75 / 1e5) ** 0.5


def test_dare_at_density_one_is_its_merge() -> None:
    base, tuned = models()
    for name, plain, options in (
        ("dare_task_arithmetic", "task_arithmetic", {"scaling": 0.4}),
        ("dare_ties", "ties", {"scaling": 0.4}),
    ):
        dropped = twin_bench.merge(name, base, tuned, density=1.0, **options)
        expected = twin_bench.merge(plain, base, tuned, **options, **({"density": 1.0} if plain == "ties" else {}))
        for tensor in base:
            torch.testing.assert_close(dropped[tensor], expected[tensor])


def test_dare_ties_is_pefts_given_the_same_draw() -> None:
    base, tuned = models()
    one_base, one_tuned = {"tall": base["tall"]}, {t: {"tall": e["tall"]} for t, e in tuned.items()}
    dropped = [
        twin_bench.merge("dare_task_arithmetic", one_base, {t: e}, scaling=1.0, density=0.4, seed=5)["tall"]
        - base["tall"]
        for t, e in one_tuned.items()
    ]
    expected = base["tall"] + merge_utils.ties(dropped, torch.ones(4), 1.0)
    found = twin_bench.merge("dare_ties", one_base, one_tuned, density=0.4, seed=5)["tall"]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_a_seed_draws_the_same_in_another_process() -> None:
    script = """
import torch, twin_bench
base, tuned = {"w": torch.zeros(9, 9)}, {"a": {"w": torch.ones(9, 9)}}
for seed in (7, 8):
    print((twin_bench.merge("dare_task_arithmetic", base, tuned, seed=seed)["w"] != 0).int().flatten().tolist())
"""
    (seven, eight), again = (
        done.stdout.splitlines()
        for done in side_by_side(*(partial(python, "-c", script, PYTHONHASHSEED=hashes) for hashes in ("1", "2")))
    )
    assert seven != eight
    assert again == [seven, eight]

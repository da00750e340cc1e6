"""The settings of exclusive vectors: what they allow, and that digests of old ones stay."""

from __future__ import annotations

from typing import Any

import pytest

from twin_bench.config import parse
from twin_bench.errors import InputError
from twin_bench.twin.recipe import ExclusiveSettings


@pytest.mark.parametrize(
    ("raw", "options"),
    [
        ({"density": 0.1}, {"density": 0.1}),
        ({"rank": 3, "bits": 4}, {"rank": 3, "bits": 4}),
        ({"rank": {"energy": 0.9}}, {"energy": 0.9}),
        ({"budget": 0.05, "bits": 8}, {"budget": 0.05, "bits": 8}),
        ({"budget": {"bytes": 1000}}, {"budget_bytes": 1000}),
        ({"kind": "sign_mask"}, {}),
        ({"kind": "bernoulli", "density": 1}, {"density": 1.0}),
        ({"density": 0.1, "from_layer": 0}, {"density": 0.1}),
    ],
)
def test_settings_are_options_of_their_kind(raw: dict[str, Any], options: dict[str, Any]) -> None:
    settings = parse(ExclusiveSettings, raw)
    assert settings.options() == options
    dumped = settings.model_dump(mode="json")
    assert dumped == {"density": None, "rank": None, **raw}
    assert parse(ExclusiveSettings, dumped) == settings


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (
            {"kind": "magnitud", "density": 0.1},
            "unknown kind of exclusive vectors 'magnitud'; did you mean 'magnitude'",
        ),
        ({"kind": "magnitude"}, "kind magnitude needs density"),
        ({"kind": "sign_mask", "bits": 8}, "kind sign_mask has no option 'bits'"),
        ({"kind": "sign_mask", "rank": {"energy": 0.9}}, "kind sign_mask has no option 'energy'"),
        ({"density": 0.1, "budget": 0.1}, "give either density or rank, or a budget"),
        ({"bits": 8}, "give either density or rank, or a budget: exactly one of them"),
        ({"rank": 0}, "exclusive.rank|rank: Input should be greater"),
        ({"rank": "all"}, r"rank: .* or: Input should be a valid mapping of keys \(found 'all'\)"),
        ({"rank": True}, "rank: expected a number"),
        ({"rank": {"energy": 1.2}}, "rank.energy"),
        ({"rank": {"energi": 0.9}}, "did you mean 'energy'"),
        ({"budget": 1.2}, "budget: Input should be less"),
        ({"budget": {"bytes": 0}}, "budget.bytes"),
        ({"rank": 2, "bits": 5}, "bits"),
        ({"rank": 2, "from_layer": -1}, "from_layer"),
        ({"rank": 2, "bits": 8, "random": True}, "random replaces factors that are not quantised"),
        ({"kind": "sign_mask", "random": True}, "random replaces factors that are not quantised"),
    ],
)
def test_wrong_settings_are_refused(raw: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        parse(ExclusiveSettings, raw, "suite.yaml")

"""What each kind keeps of a matrix, against the formula in numpy, and every way of reading it back."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.support.exclusive import kept_of
from twin_bench.errors import InputError
from twin_bench.twin.exclusive import Exclusive, exclusive_vector, find_kind, known_kinds
from twin_bench.twin.exclusive.sparse import Sparse, packed, unpacked

ENTRIES: dict[str, dict[str, Any]] = {
    "magnitude mask": {"kind": "magnitude", "density": 0.3},
    "magnitude indices": {"kind": "magnitude", "density": 0.02},
    "magnitude whole": {"kind": "magnitude", "density": 1.0},
    "bernoulli": {"kind": "bernoulli", "density": 0.4},
    "bernoulli indices": {"kind": "bernoulli", "density": 0.02},
    "signs": {"kind": "sign_mask"},
    "signs mask": {"kind": "sign_mask", "density": 0.5},
    "signs indices": {"kind": "sign_mask", "density": 0.02},
}
SHAPES = {"tall": (37, 11), "wide": (11, 37), "bytes": (16, 24)}


def pair(dtype: torch.dtype = torch.float32) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return an expert and a shared expert: matrices, a vector, and a table of which few rows differ."""
    generator = torch.Generator().manual_seed(0)
    shared = {name: torch.randn(shape, generator=generator, dtype=dtype) for name, shape in SHAPES.items()}
    shared |= {"vector": torch.randn(9, generator=generator, dtype=dtype), "table": torch.zeros(40, 8, dtype=dtype)}
    expert = {name: p + 0.1 * torch.randn(p.shape, generator=generator, dtype=dtype) for name, p in shared.items()}
    expert["table"][3:] = 0
    return expert, shared


@pytest.mark.parametrize("options", ENTRIES.values(), ids=ENTRIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_entries_are_those_of_the_formula(options: dict[str, Any], dtype: torch.dtype) -> None:
    expert, shared = pair(dtype)
    found = exclusive_vector(expert, shared, name="cola", seed=5, **options)
    assert torch.equal(found.vectors["vector"], expert["vector"] - shared["vector"])
    assert not found.factors
    nothing = [name for name, p in shared.items() if p.ndim == 2 and name not in found.sparse]
    assert all(int(options["density"] * shared[name].numel()) <= 7 for name in nothing)
    for name, one in found.sparse.items():
        delta = expert[name] - shared[name]
        expected = kept_of(options, "cola", name, delta, seed=5)
        assert one.dense().dtype == dtype
        np.testing.assert_allclose(one.dense().numpy(), expected, rtol=1e-6 if dtype == torch.float32 else 1e-12)
        assert one.count == np.count_nonzero(expected)


@pytest.mark.parametrize("options", ENTRIES.values(), ids=ENTRIES)
def test_every_way_of_reading_is_the_matrix_itself(options: dict[str, Any]) -> None:
    found = exclusive_vector(*pair(), name="cola", **options)
    for one in found.sparse.values():
        whole = one.dense()
        ids = torch.tensor([0, one.shape[0] - 1, 3, 3, 1])
        assert torch.equal(one.indexed().rows(ids), whole[ids])
        target = torch.ones(one.shape)
        one.add_to(target, -0.5)
        torch.testing.assert_close(target, 1 - 0.5 * whole)


def test_forms_are_the_smallest() -> None:
    sizes = {name: exclusive_vector(*pair(), **options) for name, options in ENTRIES.items()}
    parts = {name: set(found.sparse["bytes"].parts) for name, found in sizes.items()}
    assert parts == {
        "magnitude mask": {"values", "mask"},
        "magnitude indices": {"values", "indices"},
        "magnitude whole": {"values"},
        "bernoulli": {"values", "mask"},
        "bernoulli indices": {"values", "indices"},
        "signs": {"signs", "scale"},
        "signs mask": {"signs", "scale", "mask"},
        "signs indices": {"signs", "scale", "indices"},
    }
    assert Exclusive({}, {}, {"bytes": sizes["signs"].sparse["bytes"]}).nbytes() == 16 * 24 // 8 + 4
    assert Exclusive({}, {}, {"bytes": sizes["signs mask"].sparse["bytes"]}).nbytes() == 16 * 24 // 8 + 24 + 4
    assert Exclusive({}, {}, {"bytes": sizes["magnitude indices"].sparse["bytes"]}).nbytes() == 7 * 8
    table = sizes["signs"].sparse["table"]  # 24 of 320 entries differ: the others have no sign
    assert (table.count, set(table.parts)) == (24, {"signs", "scale", "mask"})


def test_equal_entries_are_kept_in_order() -> None:
    matrix = torch.tensor([[1.0, -1.0, 1.0, 0.5], [-1.0, 2.0, 1.0, 1.0]])
    found = exclusive_vector({"x": matrix}, {"x": torch.zeros(2, 4)}, kind="magnitude", density=0.5)
    assert found.sparse["x"].dense().tolist() == [[1, -1, 1, 0], [0, 2, 0, 0]]


def test_bernoulli_draws_depend_on_seed_and_names_alone() -> None:
    expert, shared = pair()
    first = exclusive_vector(expert, shared, kind="bernoulli", density=0.5, name="cola", seed=1)
    turned = {name: shared[name] for name in reversed(shared)}
    again = exclusive_vector(expert, turned, kind="bernoulli", density=0.5, name="cola", seed=1)
    for name in SHAPES:
        assert torch.equal(first.sparse[name].dense(), again.sparse[name].dense())
    for other in ({"name": "rte", "seed": 1}, {"name": "cola", "seed": 2}):
        found = exclusive_vector(expert, shared, kind="bernoulli", density=0.5, **other)
        assert not torch.equal(found.sparse["tall"].dense(), first.sparse["tall"].dense())
    draws = [
        exclusive_vector(expert, shared, kind="bernoulli", density=0.5, name="cola", seed=seed).sparse["bytes"].dense()
        for seed in range(400)
    ]
    delta = expert["bytes"] - shared["bytes"]
    assert (torch.stack(draws).mean(dim=0) - delta).abs().max() < 5 * delta.abs().max() / 20  # unbiased


@pytest.mark.parametrize("count", [0, 1, 7, 8, 9, 64])
def test_bits(count: int) -> None:
    bits = torch.rand(count, generator=torch.Generator().manual_seed(count)) < 0.5
    assert packed(bits).tolist() == list(np.packbits(bits.numpy(), bitorder="little"))
    assert torch.equal(unpacked(packed(bits), count), bits)


def test_a_parameter_can_be_left_out() -> None:
    found = exclusive_vector(*pair(), rank=2, without={"tall", "vector"})
    assert set(found.names()) == {"wide", "bytes", "table"}


def test_kinds_have_headers() -> None:
    assert list(known_kinds()) == ["bernoulli", "magnitude", "sign_mask", "svd"]
    assert [name for name, kind in known_kinds().items() if kind.draws] == ["bernoulli"]
    assert find_kind("magnitude").options == {"density": True}
    assert all(kind.documentation and kind.paper for kind in known_kinds().values())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "signs"}, "unknown kind of exclusive vectors 'signs'"),
        ({"kind": "magnitude", "rank": 3}, "kind magnitude has no option 'rank'; known: density"),
        ({"kind": "magnitude"}, "kind magnitude needs density"),
        ({"kind": "magnitude", "density": 1.5}, r"density of kind magnitude must be in \(0, 1\], not 1.5"),
        ({"kind": "bernoulli", "density": 0}, "density of kind bernoulli"),
        ({"kind": "sign_mask", "density": -1}, "density of kind sign_mask"),
        ({}, "give either density or rank, or a budget"),
        ({"rank": 3, "energy": 0.5}, "give either density or rank, or a budget"),
        ({"energy": 1.5}, r"rank.energy must be in \(0, 1\]"),
        ({"budget": 0}, r"budget must be in \(0, 1\]"),
    ],
)
def test_wrong_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        exclusive_vector(*pair(), **options)


def test_a_sparse_matrix_of_half_precision_keeps_its_dtype() -> None:
    one = Sparse.of(torch.ones(3, 5, dtype=torch.bfloat16), torch.eye(3, 5).bool())
    assert one.dense().dtype == torch.bfloat16

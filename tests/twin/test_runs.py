"""Rows that use few experts multiply the columns of these alone."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

from tests.support.launches import multiplications
from twin_bench import InputError
from twin_bench.checkpoints.factors import Factors
from twin_bench.compat import Conv1D
from twin_bench.twin.exclusive import Exclusive
from twin_bench.twin.exclusive.sparse import Sparse
from twin_bench.twin.fusion import Fusion
from twin_bench.twin.layers import TwinConv1D, TwinLinear, install, runs
from twin_bench.twin.plan import Costs, batches, plan
from twin_bench.twin.tolerance import simplified

IN, OUT, EXPERTS, RANK, ROWS, TOKENS = 192, 256, 8, 4, 16, 128
BIASES = ROWS * EXPERTS * OUT
PLAIN, COLUMN = ROWS * TOKENS * IN * OUT + BIASES, ROWS * TOKENS * (IN + OUT)
ONE = torch.eye(EXPERTS).repeat_interleave(2, dim=0)
TWO = 0.7 * ONE + 0.3 * ONE.roll(1, dims=1)
FLAT = torch.full((ROWS, EXPERTS), 1 / EXPERTS)
NOT_ALL = torch.cat([torch.zeros(2, EXPERTS), TWO[2:]])


@pytest.fixture
def no_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let multiplications alone decide, as in layers of real widths."""
    monkeypatch.setattr(runs, "START", {4: 0.0})


def made(kind: type[nn.Module], dtype: torch.dtype, *, joint: bool = False) -> tuple[Any, Fusion, Tensor]:
    """Return a layer with random experts, its fusion, and what each expert adds (experts, in, out) in float64.

    The experts of `joint` have their columns in few directions.
    """
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator) / shape[-1] ** 0.5

    rank, directions = RANK, 3 * RANK if joint else 0
    down, up = random(directions, IN), random(OUT, directions)
    factors = [
        Factors(up @ random(directions, rank), random(rank, directions) @ down)
        if joint
        else Factors(random(OUT, rank), random(rank, IN))
        for _ in range(EXPERTS)
    ]
    added = torch.stack([(pair.B.double() @ pair.A.double()).T for pair in factors])
    if kind is Conv1D:
        factors = [Factors(pair.A.T.contiguous(), pair.B.T.contiguous()) for pair in factors]
    layer = (nn.Linear(IN, OUT) if kind is nn.Linear else Conv1D(OUT, IN)).to(dtype)
    nn.init.normal_(layer.bias)
    fusion = Fusion(EXPERTS)
    moved = {"x.bias": torch.randn(OUT, generator=generator)}
    exclusive = {f"e{k}": Exclusive({"x.weight": one}, moved if k else {}) for k, one in enumerate(factors)}
    twin = (TwinLinear if kind is nn.Linear else TwinConv1D)(layer, fusion, "x", exclusive)
    assert (twin.basis is not None) == joint
    return twin, fusion, added


@torch.no_grad()
def by_row(twin: Any, fusion: Fusion, weights: Tensor, x: Tensor) -> tuple[Tensor, int]:
    """Return a layer's output and the multiplications that it took."""
    found: list[Tensor] = []
    with fusion.per_row(weights):
        count = multiplications(lambda: found.append(twin(x)))
    return found[0], count


@pytest.mark.usefixtures("no_starts")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", [nn.Linear, Conv1D])
@pytest.mark.parametrize(("weights", "columns"), [(ONE, 1), (TWO, 2), (NOT_ALL, 1.75), (FLAT, EXPERTS)])
def test_a_row_multiplies_its_own_experts_columns_alone(
    kind: type[nn.Module], dtype: torch.dtype, weights: Tensor, columns: float
) -> None:
    twin, fusion, added = made(kind, dtype)
    x = torch.randn(ROWS, TOKENS, IN, generator=torch.Generator().manual_seed(1)).to(dtype)
    found, count = by_row(twin, fusion, weights, x)
    assert count == PLAIN + columns * RANK * COLUMN
    weight = twin.weight.double().T if kind is nn.Linear else twin.weight.double()
    bias = twin.bias.double() + weights.double() @ twin.bias_vectors.double()
    dense = weight + torch.einsum("be,eio->bio", weights.double(), added)
    expected = torch.bmm(x.double(), dense) + bias[:, None]
    assert (found.double() - expected).norm() <= (1e-6 if dtype == torch.float32 else 6e-3) * expected.norm()


@pytest.mark.usefixtures("no_starts")
def test_rounded_away_weights_cost_what_zeros_cost() -> None:
    twin, fusion, _ = made(nn.Linear, torch.float32)
    x = torch.randn(ROWS, TOKENS, IN, generator=torch.Generator().manual_seed(1))
    tiny = torch.where(ONE == 0, 1e-9, ONE)
    zeros, fewest = by_row(twin, fusion, ONE, x)
    rounded, count = by_row(twin, fusion, simplified(tiny, torch.finfo(torch.float32).eps / 2), x)
    assert count == fewest < by_row(twin, fusion, tiny, x)[1]
    assert torch.equal(rounded, zeros)


@pytest.mark.usefixtures("no_starts")
def test_a_joint_basis_is_left_for_columns_where_those_are_fewer() -> None:
    """The columns are made of the basis first, for all experts."""
    twin, fusion, added = made(nn.Linear, torch.float32, joint=True)
    x = torch.randn(ROWS, 2 * TOKENS, IN, generator=torch.Generator().manual_seed(1))
    directions, plain = 3 * RANK, 2 * (PLAIN - BIASES) + BIASES
    found, count = by_row(twin, fusion, ONE * 0.5, x)
    assert count == plain + 2 * RANK * COLUMN + directions * RANK * EXPERTS * (IN + OUT)
    bias = twin.bias + 0.5 * ONE @ twin.bias_vectors
    dense = twin.weight.double().T + 0.5 * added[ONE.argmax(dim=1)]
    torch.testing.assert_close(found.double(), torch.bmm(x.double(), dense) + bias[:, None], rtol=1e-4, atol=1e-4)
    mixed = directions * 2 * (COLUMN + ROWS * TOKENS * directions) + ROWS * EXPERTS * directions**2
    assert by_row(twin, fusion, FLAT, x)[1] == plain + mixed


@pytest.mark.parametrize("tokens", [1, 2])
def test_small_batches_take_one_product(tokens: int) -> None:
    """To start many products would take longer than they save."""
    twin, fusion, _ = made(nn.Linear, torch.float32)
    x = torch.randn(ROWS, tokens, IN, generator=torch.Generator().manual_seed(1))
    assert by_row(twin, fusion, ONE, x)[1] == BIASES + ROWS * tokens * (IN * OUT + EXPERTS * RANK * (IN + OUT))


def test_a_plan_puts_rows_together_that_use_the_same_experts() -> None:
    """Too few rows use each pair to be a group. In every batch a pair's rows are next to each other."""
    generator = torch.Generator().manual_seed(0)
    first, second = (torch.randint(EXPERTS, (96,), generator=generator) for _ in range(2))
    weights = torch.rand(96, 1, generator=generator) * torch.eye(EXPERTS)[first] + torch.eye(EXPERTS)[second]
    lengths = torch.randint(5, 60, (96,), generator=generator).tolist()
    costs = Costs((1e9,) * EXPERTS, 1e9, (0.1,) * EXPERTS, 0.5, batch=32.0)
    (group,) = plan(weights, lengths, costs)
    cut = batches(group, lengths, 32, costs, weights=weights)
    assert sorted(row for batch in cut for row in batch.rows) == list(range(96))
    used = (weights != 0).tolist()
    for batch in cut:
        sets = [tuple(used[row]) for row in batch.rows]
        changes = sum(one != other for one, other in itertools.pairwise(sets))
        assert changes == len(set(sets)) - 1


@pytest.mark.usefixtures("no_starts")
@pytest.mark.parametrize("weights", [torch.eye(4), torch.full((4, 4), 0.25)], ids=["runs", "columns"])
def test_a_layer_that_reads_what_rows_share_is_refused(weights: Tensor) -> None:
    """DeBERTa projects its relative positions, (1, distances, width), with the layers that project the tokens."""
    torch.manual_seed(0)
    config = transformers.DebertaV2Config(
        vocab_size=20,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        relative_attention=True,
        pos_att_type=["p2c", "c2p"],
        share_att_key=True,
        position_buckets=8,
        max_position_embeddings=16,
    )
    model = transformers.DebertaV2Model(config).eval()
    name = "encoder.layer.0.attention.self.query_proj"
    fusion = install(
        model,
        {f"e{k}": Exclusive({f"{name}.weight": Factors(torch.randn(16, 1), torch.randn(1, 16))}, {}) for k in range(4)},
    )
    ids = torch.randint(20, (4, 6))
    with torch.no_grad(), fusion.per_row(weights), pytest.raises(InputError, match=rf"^{name}: .*batch_size=1"):
        model(input_ids=ids)
    with torch.no_grad(), fusion.per_row(weights[2:3]):
        alone = model(input_ids=ids[2:3]).last_hidden_state
    with torch.no_grad(), fusion.fuse(weights[2]):
        torch.testing.assert_close(model(input_ids=ids[2:3]).last_hidden_state, alone, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kept", ["bias", "entries"])
def test_a_layer_without_factors_takes_rows_that_no_expert_answers(kept: str) -> None:
    torch.manual_seed(0)
    model = nn.ModuleDict({"a": nn.Linear(6, 5)})
    if kept == "bias":
        expert = Exclusive({}, {"a.bias": torch.ones(5)})
    else:
        expert = Exclusive({}, {}, {"a.weight": Sparse.of(torch.ones(5, 6), torch.eye(5, 6) > 0)})
    x, expected = torch.randn(2, 3, 6), nn.functional.linear
    fusion = install(model, {"e": expert})
    with torch.no_grad(), fusion.per_row(torch.zeros(2, 1)):
        torch.testing.assert_close(model["a"](x), expected(x, model["a"].weight, model["a"].bias))


def test_runs_of_a_prompt_are_not_those_of_its_steps() -> None:
    """One block runs forwards of several lengths. Whether it takes runs, and which, is found for each length."""
    twin, fusion, added = made(nn.Linear, torch.float32)
    bias = twin.bias + ONE @ twin.bias_vectors
    dense = twin.weight.double().T + added[ONE.argmax(dim=1)]
    with torch.no_grad(), fusion.per_row(ONE, steps=True):
        for tokens, columns in ((TOKENS, 1), (1, EXPERTS), (2, EXPERTS), (TOKENS - 20, 1)):
            x = torch.randn(ROWS, tokens, IN, generator=torch.Generator().manual_seed(tokens))
            found: list[Tensor] = []
            count = multiplications(lambda x=x, found=found: found.append(twin(x)))
            made_once = BIASES if tokens == TOKENS else 0
            assert count == made_once + ROWS * tokens * (IN * OUT + columns * RANK * (IN + OUT))
            expected = torch.bmm(x.double(), dense) + bias[:, None]
            torch.testing.assert_close(found[0].double(), expected, rtol=1e-4, atol=1e-4)

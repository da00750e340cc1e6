"""The joint basis of experts' factors, by itself and in twins of LoRA experts."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from transformers.pytorch_utils import Conv1D

from twin_bench.merging.linear_algebra import truncated_svd
from twin_bench.twin.basis import find_joint_basis, product_norm
from twin_bench.twin.exclusive import Exclusive
from twin_bench.twin.fusion import Fusion
from twin_bench.twin.layers import TwinConv1D, TwinLinear, find_together, install


def lora_experts(n: int, m: int, rank: int, experts: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Return (m, n) differences theta_t - theta_s of LoRA experts, each of rank experts * rank."""
    generator = torch.Generator().manual_seed(0)
    taus = [
        torch.randn(m, rank, generator=generator) @ torch.randn(rank, n, generator=generator) for _ in range(experts)
    ]
    return [(tau - 0.3 * sum(taus)).to(dtype) for tau in taus]


@pytest.mark.parametrize(("n", "m"), [(48, 48), (40, 96), (96, 40)])
def test_a_joint_basis_holds_every_expert_in_fewer_columns(n: int, m: int) -> None:
    factors = [truncated_svd(tau, 6) for tau in lora_experts(n, m, 2, 5)]
    down, up = torch.cat([f.A for f in factors]).T, torch.cat([f.B for f in factors], dim=1).T
    owner = torch.arange(5).repeat_interleave(6)
    joint = find_joint_basis(down, up, owner, 5, noise=lambda: 1e-3)
    assert joint is not None
    assert joint.down.shape == (n, 10)
    assert joint.up.shape == (10, m)
    torch.testing.assert_close(joint.down @ joint.inner, down, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(joint.outer @ joint.up, up, rtol=1e-5, atol=1e-5)
    for k, (B, A) in enumerate(factors):
        torch.testing.assert_close(joint.down @ joint.cores[k] @ joint.up, (B @ A).T, rtol=1e-5, atol=1e-5)


def test_experts_that_share_nothing_have_no_joint_basis() -> None:
    generator = torch.Generator().manual_seed(0)
    down, up = torch.randn(64, 20, generator=generator), torch.randn(20, 64, generator=generator)
    assert find_joint_basis(down, up, torch.arange(4).repeat_interleave(5), 4, noise=lambda: 1.0) is None


@pytest.mark.parametrize(("difference", "columns"), [(1e-3, 12), (1e-5, None), (1e-7, 8)])
def test_directions_that_are_weak_but_no_rounding_are_kept(difference: float, columns: int | None) -> None:
    """Experts of eight directions that differ in four more, by a part of their size.

    These count where they can be told from rounding; where they are hardly above it there is no joint basis; and they
    are left out where they are rounding themselves.
    """
    generator = torch.Generator().manual_seed(0)

    def drawn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    down, up, apart = drawn(256, 8), drawn(8, 256), drawn(256, 4)
    downs = torch.cat([down + difference * apart @ drawn(4, 8) for _ in range(5)], dim=1)
    ups, owner = up.repeat(5, 1), torch.arange(5).repeat_interleave(8)
    noise = 1e-6 * float((down @ up).norm())
    joint = find_joint_basis(downs, ups, owner, 5, noise=lambda: noise)
    assert (None if joint is None else joint.down.shape[1]) == columns
    if joint is not None:
        for k in range(5):
            own = downs[:, owner == k].double() @ ups[owner == k].double()
            kept = joint.down.double() @ joint.cores[k].double() @ joint.up.double()
            assert (own - kept).norm() <= 2 * noise


@pytest.mark.parametrize("kind", [nn.Linear, Conv1D])
@pytest.mark.parametrize("tokens", [1, 7])
@pytest.mark.parametrize("used", [(0, 1, 2, 3, 4), (1, 3), (2,), ()])
def test_every_path_of_a_layer_is_the_dense_layer(kind: type[nn.Module], tokens: int, used: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(1)
    layer = kind(40, 96) if kind is nn.Linear else kind(96, 40)
    nn.init.normal_(layer.bias)
    taus = lora_experts(40, 96, 2, 5)
    taus = taus if kind is nn.Linear else [tau.T.contiguous() for tau in taus]
    factors = [truncated_svd(tau, 6) for tau in taus]
    exclusive = {f"e{k}": Exclusive({"x.weight": f}, {}) for k, f in enumerate(factors)}
    fusion = Fusion(5)
    twin = (TwinLinear if kind is nn.Linear else TwinConv1D)(layer, fusion, "x", exclusive)
    assert twin.basis is not None
    weights = torch.zeros(3, 5)
    weights[:, list(used)] = torch.randn(3, len(used), generator=generator)
    x = torch.randn(3, tokens, 40, generator=generator)
    with torch.no_grad(), fusion.per_row(weights):
        found = twin(x)
    for row in range(3):
        dense = layer.weight.double() + sum(
            w * (f.B @ f.A).double() for w, f in zip(weights[row], factors, strict=True)
        )
        product = x[row].double() @ (dense.T if kind is nn.Linear else dense)
        torch.testing.assert_close(found[row].double(), product + layer.bias.double(), rtol=1e-4, atol=1e-4)
        with torch.no_grad(), fusion.fuse(weights[row]):
            torch.testing.assert_close(twin(x[row : row + 1])[0], found[row], rtol=1e-4, atol=1e-4)


def test_the_cheaper_of_columns_and_basis_is_taken() -> None:
    """A row that uses one expert multiplies that expert's columns, one that uses all the joint basis.

    The columns are made of the basis for the whole batch, and the basis' cores are summed for each row. The shared
    weight's product is added in place, which the counter leaves out.
    """
    factors = [truncated_svd(tau, 6) for tau in lora_experts(40, 96, 2, 5)]
    exclusive = {f"e{k}": Exclusive({"x.weight": f}, {}) for k, f in enumerate(factors)}
    fusion = Fusion(5)
    twin = TwinLinear(nn.Linear(40, 96), fusion, "x", exclusive)
    x = torch.randn(2, 64, 40, generator=torch.Generator().manual_seed(0))
    multiplications = []
    for weights in (torch.eye(5)[[1, 1]], torch.ones(2, 5)):
        with torch.no_grad(), fusion.per_row(weights), FlopCounterMode(display=False) as counter:
            twin(x)
        multiplications.append(counter.get_total_flops() // 2)
    columns, basis = 128 * 6 * 136 + 10 * 6 * 136, 128 * (10 * 136 + 10 * 10) + 2 * 5 * 10 * 10
    assert multiplications == [columns, basis]


@pytest.mark.parametrize("used", [(1,), (0, 1, 2, 3, 4)], ids=["columns", "basis"])
@torch.no_grad()
def test_each_of_the_layers_that_read_one_input_has_its_own_basis(used: tuple[int, ...]) -> None:
    """Of one expert in use columns are made of the basis, and of all the cores are mixed (see the test above)."""
    taus = lora_experts(40, 96, 2, 5)
    factors = {
        "a": [truncated_svd(tau, 6) for tau in taus],
        "b": [truncated_svd(tau.flip(0, 1), 6) for tau in taus],
        "c": [truncated_svd(tau.roll(7, 0).roll(9, 1), 6) for tau in reversed(taus)],
    }
    model = nn.ModuleDict({name: nn.Linear(40, 96) for name in factors})
    fusion = install(
        model, {f"e{k}": Exclusive({f"{name}.weight": own[k] for name, own in factors.items()}, {}) for k in range(5)}
    )
    assert all(layer.basis is not None for layer in model.values())
    generator = torch.Generator().manual_seed(0)
    weights = torch.zeros(2, 5)
    weights[:, list(used)] = torch.rand(2, len(used), generator=generator) + 0.5
    for tokens in (64, 5, 64):
        x = torch.randn(2, tokens, 40, generator=generator)
        with find_together(fusion), fusion.per_row(weights):
            found = {name: layer(x) for name, layer in model.items()}
        for name, own in factors.items():
            added = torch.einsum("bk,koi->boi", weights, torch.stack([f.B @ f.A for f in own]))
            expected = torch.einsum("bti,boi->bto", x, model[name].weight + added) + model[name].bias
            torch.testing.assert_close(found[name], expected, rtol=1e-4, atol=1e-4)
    assert [len(one.layers) for one in fusion.together] == [3]


def test_costs_are_the_multiplications_of_a_token() -> None:
    factors = [truncated_svd(tau, 6) for tau in lora_experts(40, 96, 2, 5)]
    fusion = Fusion(5)
    TwinLinear(nn.Linear(40, 96), fusion, "x", {f"e{k}": Exclusive({"x.weight": f}, {}) for k, f in enumerate(factors)})
    costs = fusion.costs()
    assert [own / costs.token for own in costs.columns] == pytest.approx([6 * 136 / 3840] * 5)
    assert costs.joint / costs.token == pytest.approx((10 * 136 + 10 * 10) / 3840)
    for used in itertools.product([False, True], repeat=5):
        expected = min(sum(used) * 6 * 136, 1460) / 3840
        assert costs.low_rank(torch.tensor([used])).item() / costs.token == pytest.approx(expected)


def test_half_precision_keeps_every_direction() -> None:
    """The basis is that of the float32 factors: bfloat16's rounding neither adds directions nor drops weak ones."""
    factors = [truncated_svd(tau, 6) for tau in lora_experts(40, 96, 2, 5)]
    factors[0] = type(factors[0])(0.01 * factors[0].B, factors[0].A)
    exclusive = {f"e{k}": Exclusive({"x.weight": f}, {}) for k, f in enumerate(factors)}
    fusion = Fusion(5)
    twin = TwinLinear(nn.Linear(40, 96).to(torch.bfloat16), fusion, "x", exclusive)
    assert twin.basis is not None
    assert twin.basis.cores.dtype is torch.bfloat16
    assert twin.basis.cores.shape == (5, 10, 10)
    x = torch.randn(2, 64, 40, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    with torch.no_grad(), fusion.per_row(torch.ones(2, 5)):
        found = twin(x).float()
    with torch.no_grad(), fusion.fuse(torch.ones(5)):
        fused = twin(x).float()
    weight = twin.weight.float() + sum(f.B @ f.A for f in factors)
    expected = x.float() @ weight.T + twin.bias.float()
    assert (found - expected).norm() <= 0.01 * expected.norm()
    assert (fused - expected).norm() <= 0.01 * expected.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_products_norm_is_that_of_the_dense_product(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    left, right = torch.randn(40, 3).to(dtype), torch.randn(3, 70).to(dtype)
    expected = (left.double() @ right.double()).norm().item()
    assert product_norm(left, right) == pytest.approx(expected, rel=1e-12)
    assert product_norm(left[:, :0], right[:0]) == 0.0
    assert product_norm(torch.cat([left, -left], dim=1), torch.cat([right, right])) < 1e-6 * expected

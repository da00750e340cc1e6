"""The router: its features, training, selection and weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from tests.support.dense import batch
from twin_bench import InputError, TwinModel
from twin_bench.data.task import TaskInput
from twin_bench.twin.builder import build_twin
from twin_bench.twin.recipe import Recipe
from twin_bench.twin.routers.base import RouterConfig, fusion_weights
from twin_bench.twin.routers.kinds.mlp import MlpRouter, short_epochs, train_router
from twin_bench.twin.routers.rows import divided, held_out_rows


@pytest.fixture(scope="module", params=["bert", "gpt2"])
def twin(request: pytest.FixtureRequest, twins: Any) -> TwinModel:
    return TwinModel.from_pretrained(twins(request.param))


def test_features_are_the_mean_of_transformers_own_hidden_states(twin: TwinModel) -> None:
    inputs = batch(5)
    with torch.no_grad():
        states = twin.model.base_model(**inputs, output_hidden_states=True).hidden_states
    layers = [0, 1, 2, -1]
    for layer, features in zip(layers, twin.features(inputs, layers), strict=True):
        for row in range(5):
            length = int(inputs["attention_mask"][row].sum())
            expected = states[layer][row, :length].mean(dim=0)
            torch.testing.assert_close(features[row], expected, rtol=1e-5, atol=1e-6)


def test_an_early_layer_runs_no_later_block(twin: TwinModel) -> None:
    ran = []
    blocks = next(m for m in twin.model.base_model.modules() if isinstance(m, torch.nn.ModuleList))
    hooks = [block.register_forward_hook(lambda *_, i=i: ran.append(i)) for i, block in enumerate(blocks)]
    twin.features(batch(2), [1])
    assert ran == [0]
    twin.features(batch(2), [0])
    assert ran == [0]
    for hook in hooks:
        hook.remove()


def test_padding_changes_no_weight(twin: TwinModel) -> None:
    encoded = twin.encode([("the cat", None), ("a dog did sit on the big red cat", "why")], max_length=64)
    together = twin.route_all(encoded, [], batch_size=2)
    for row, one in enumerate(encoded):
        torch.testing.assert_close(twin.route_all([one], [])[0], together[row], rtol=1e-5, atol=1e-6)


def test_weights_are_a_softmax_with_temperature_and_top_k() -> None:
    logits = torch.tensor([[2.0, 1.0, 0.0], [0.0, 3.0, 3.5]])
    config = RouterConfig(("a", "b", "c"), 4, temperature=0.5)
    torch.testing.assert_close(fusion_weights(logits, config), (2 * logits).exp() / (2 * logits).exp().sum(1, True))
    one = fusion_weights(logits, RouterConfig(("a", "b", "c"), 4, top_k=1))
    assert one.tolist() == [[1, 0, 0], [0, 0, 1]]
    two = fusion_weights(logits, RouterConfig(("a", "b", "c"), 4, top_k=2))
    torch.testing.assert_close(two[0], torch.tensor([torch.e / (1 + torch.e), 1 / (1 + torch.e), 0.0]))
    for wrong in ({"top_k": 4}, {"top_k": -1}, {"temperature": 0.0}):
        with pytest.raises(InputError, match="router: "):
            MlpRouter(RouterConfig(("a", "b", "c"), 4, **wrong))  # type: ignore[arg-type]


def clusters(rows: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    tasks = torch.randint(3, (rows,), generator=generator)
    return torch.randn(rows, 8, generator=generator) + 3 * torch.eye(3, 8)[tasks], tasks


def test_training_learns_is_seeded_and_leaves_the_global_generator() -> None:
    config = RouterConfig(("a", "b", "c"), 8)
    torch.manual_seed(11)
    before = torch.get_rng_state()
    one = train_router(config, *clusters(600, 0), *clusters(300, 1), epochs=15, seed=4)
    assert torch.equal(torch.get_rng_state(), before)
    assert one.accuracy > 0.85
    predicted = one.router.weights(clusters(300, 1)[0]).argmax(dim=1)
    assert one.accuracy == pytest.approx((predicted == clusters(300, 1)[1]).float().mean().item())
    torch.manual_seed(12)
    again = train_router(config, *clusters(600, 0), *clusters(300, 1), epochs=15, seed=4)
    other = train_router(config, *clusters(600, 0), *clusters(300, 1), epochs=15, seed=5)
    features = clusters(50, 2)[0]
    assert torch.equal(one.router(features), again.router(features))
    assert not torch.equal(one.router(features), other.router(features))


def test_the_selection_rows_choose_the_epoch() -> None:
    """With labels on which training must get worse, the first epochs win; with true ones, later ones do."""
    config = RouterConfig(("a", "b", "c"), 8)
    features, tasks = clusters(300, 1)
    true = train_router(config, *clusters(600, 0), features, tasks, epochs=12)
    wrong = train_router(config, *clusters(600, 0), features, (tasks + 1) % 3, epochs=12)
    assert wrong.epoch < true.epoch
    assert wrong.accuracy < 0.6 < true.accuracy


def test_epochs_that_are_given_are_those_of_the_authors() -> None:
    """Against their loop: Adam at a constant rate, on the features as they are."""
    config, (features, tasks), chosen = RouterConfig(("a", "b", "c"), 8), clusters(100, 0), clusters(60, 1)
    trained = train_router(config, features, tasks, *chosen, epochs=3, seed=4)
    torch.manual_seed(4)
    router = MlpRouter(config)
    adam = torch.optim.Adam(router.parameters(), lr=5e-4)
    found = {}
    for epoch in (1, 2, 3):
        router.train()
        for rows in torch.randperm(100).split(32):
            adam.zero_grad()
            F.cross_entropy(router(features[rows]), tasks[rows]).backward()
            adam.step()
        router.eval()
        found[epoch] = router(chosen[0]).detach()
    assert torch.equal(trained.router(chosen[0]), found[trained.epoch])


def test_a_short_training_is_of_standardised_features() -> None:
    """Features in other units make the same router, which reads them as they are."""
    config, (features, tasks), (chosen, owners) = RouterConfig(("a", "b", "c"), 8), clusters(600, 0), clusters(300, 1)
    scale, shift = torch.logspace(-1, 1, 8), torch.linspace(-3, 3, 8)
    plain = train_router(config, features, tasks, chosen, owners, seed=4)
    scaled = train_router(config, features * scale + shift, tasks, chosen * scale + shift, owners, seed=4)
    assert plain.accuracy > 0.85
    expected, found = plain.router(chosen), scaled.router(chosen * scale + shift)
    torch.testing.assert_close(found, expected, rtol=0, atol=0.02 * expected.std().item())
    assert scaled.epoch == plain.epoch


def test_a_feature_that_hardly_varies_is_not_made_large() -> None:
    features, tasks = clusters(600, 0)
    flat = torch.cat([features, 5 + 1e-6 * features[:, :1], torch.ones(600, 1)], dim=1)
    trained = train_router(RouterConfig(("a", "b", "c"), 10), flat, tasks, flat, tasks)
    noise = torch.tensor([0.0] * 8 + [1e-6, 0.0])
    torch.testing.assert_close(trained.router(flat + noise), trained.router(flat), rtol=1e-2, atol=1e-2)


def test_a_large_feature_that_bfloat16_rounds_is_not_made_large() -> None:
    features, tasks = clusters(600, 0)
    large = 101.2 + 1e-3 * torch.randn(600, 1, generator=torch.Generator().manual_seed(1))
    both = torch.cat([features, large], dim=1)
    router = train_router(RouterConfig(("a", "b", "c"), 9), both, tasks, both, tasks).router
    served = [(router(given).argmax(dim=1) == tasks).float().mean().item() for given in (both, both.bfloat16().float())]
    assert min(served) > 0.85
    assert served[1] == pytest.approx(served[0], abs=0.02)


def test_the_rate_of_a_short_training_rises_and_falls(monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    step = torch.optim.Adam.step
    monkeypatch.setattr(
        torch.optim.Adam, "step", lambda self, *args: found.append(self.param_groups[0]["lr"]) or step(self, *args)
    )
    features, tasks = clusters(600, 0)
    train_router(RouterConfig(("a", "b", "c"), 8), features, tasks, features, tasks)
    assert max(found) == pytest.approx(2e-3, rel=0.01)
    assert found.index(max(found)) == pytest.approx(0.2 * len(found), abs=2)
    assert found[0] < 1e-4
    assert found[-1] < 1e-5


def test_few_rows_have_more_short_epochs() -> None:
    rows = (2, 250, 1280, 7200, 24300, 1_000_000)
    assert [short_epochs(count) for count in rows] == [50, 25, 5, 5, 5, 5]


def test_one_row_left_over_does_not_break_batch_norm() -> None:
    trained = train_router(RouterConfig(("a", "b", "c"), 8), *clusters(1025, 0), *clusters(30, 1), epochs=1)
    assert trained.epoch == 1


def test_held_out_rows_are_a_fraction_of_each_task_and_never_a_training_text() -> None:
    rows = [TaskInput(f"text {index % 70}", None, task) for task in ("a", "b") for index in range(100)]
    mask = held_out_rows(rows, ("a", "b"), 0.2, seed=0)
    for task in ("a", "b"):
        own = [bool(held) for row, held in zip(rows, mask, strict=True) if row.task == task]
        assert 15 <= sum(own) <= 35
    kept = {row.text for row, held in zip(rows, mask, strict=True) if not held}
    assert not kept & {row.text for row, held in zip(rows, mask, strict=True) if held}
    assert not torch.equal(mask, held_out_rows(rows, ("a", "b"), 0.2, seed=1))


def test_routers_round_trip(twin: TwinModel, families: Any, tmp_path: Path) -> None:
    family = families("bert")
    settings = {**family.recipe["router"], "top_k": 2, "temperature": 0.7, "layer": 1}
    build_twin(Recipe.model_validate({**family.recipe, "router": settings}), tmp_path / "twin")
    loaded = TwinModel.from_pretrained(tmp_path / "twin")
    assert loaded.router is not None
    assert (loaded.router.config.layer, loaded.router.config.top_k, loaded.router.config.temperature) == (1, 2, 0.7)
    weights = loaded.route(**batch(6))
    assert ((weights > 0).sum(dim=1) == 2).all()


def test_half_of_the_held_out_rows_choose_and_the_other_half_reports() -> None:
    rows = [TaskInput(f"{name} {row % 50}", None, name) for row in range(60) for name in ("a", "b")]
    for limit, held_out in ((1000, 0.2), (40, 0.35)):
        parted = divided(rows, ("a", "b"), limit=limit, held_out=held_out, seed=0)
        assert torch.equal(parted.held_out, held_out_rows(parted.rows, ("a", "b"), held_out, seed=0))
        assert not (parted.choosing & parted.reporting).any()
        assert parted.reported_on == "other held-out training rows"
        masks = (~parted.held_out, parted.choosing, parted.reporting)
        texts = [{row.text for row, own in zip(parted.rows, mask, strict=True) if own} for mask in masks]
        assert len(set.union(*texts)) == sum(map(len, texts))  # copies of a text stand together
        for name in ("a", "b"):
            own = torch.tensor([row.task == name for row in parted.rows])
            assert 0 <= int((parted.choosing & own).sum()) - int((parted.reporting & own).sum()) <= 2
            assert parted.fitted((name,)) == [int((~parted.held_out & own).sum())]


def test_a_task_with_one_held_out_text_is_reported_on_what_chose() -> None:
    rows = [TaskInput(f"a {row}", None, "a") for row in range(40)] + [TaskInput(f"b {row}", None, "b") for row in "123"]
    parted = divided(rows, ("a", "b"), limit=1000, held_out=0.2, seed=0)
    assert torch.equal(parted.choosing, parted.reporting)
    assert int(parted.choosing.sum()) == 8 + 1
    assert parted.reported_on == "the rows that it was chosen on"

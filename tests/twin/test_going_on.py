"""Exclusive vectors from a layer on: what is stored, and a scoring pass that goes on from the routing pass."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from tests.support.dense import batch
from tests.support.families import built, make_family
from twin_bench import InputError, TwinModel
from twin_bench.twin import going_on
from twin_bench.twin.directory import load_parts
from twin_bench.twin.exclusive import exclusive_vector
from twin_bench.twin.features import blocks_of
from twin_bench.twin.layers import install
from twin_bench.twin.recipe import Recipe

pytestmark = pytest.mark.versions

DEPTH = 4
CONFIGS: dict[str, dict[str, int]] = {
    "bert": {"num_hidden_layers": DEPTH},
    "gpt2": {"n_layer": DEPTH},
    "distilbert": {"n_layers": DEPTH},
}
BEFORE = {"bert": "embeddings", "gpt2": "wte|wpe", "distilbert": "embeddings"}


@pytest.fixture(scope="module")
def recipes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    return {
        kind: make_family(tmp_path_factory.mktemp(kind), kind, {"cola": 2, "mnli": 3}, config).recipe
        for kind, config in CONFIGS.items()
    }


@pytest.fixture(scope="module")
def directory(recipes: dict[str, dict[str, Any]], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Return a function from a kind to a twin whose experts begin at layer 2, and whose router reads it."""
    found: dict[str, Path] = {}

    def build(kind: str) -> Path:
        if kind not in found:
            recipe = recipes[kind]
            settings = {"exclusive": {"rank": 3, "from_layer": 2}, "router": {**recipe["router"], "layer": 2}}
            found[kind] = built({**recipe, **settings}, tmp_path_factory.mktemp("twin") / "twin")
        return found[kind]

    return build


def counted(twin: Any) -> Counter[int]:
    """Return a counter of the rows for which each block runs: the calls of the first module with weights inside it."""
    twin(**batch(1), task="cola")  # once, a twin finds out where it can begin
    runs: Counter[int] = Counter()
    for index, block in enumerate(blocks_of(twin.backbone, DEPTH)):
        first = next(module for module in block.modules() if module._parameters)
        first.register_forward_pre_hook(lambda _, args, index=index: runs.update({index: len(args[0])}))
    return runs


def never(twin: TwinModel) -> None:
    """Make a twin run every pass from the beginning."""
    twin.__dict__["_start"] = going_on.Start(0, ())


@pytest.mark.parametrize("kind", CONFIGS)
def test_layers_below_stay_the_shared_experts(directory: Callable[[str], Path], kind: str) -> None:
    twin = TwinModel.from_pretrained(directory(kind))
    names = {name for own in load_parts(directory(kind)).exclusive.values() for name in own.names()}
    blocks = blocks_of(twin.backbone, DEPTH)
    path = next(name for name, module in twin.backbone.named_modules() if module is blocks)
    own = {name for name in names if f"{path}." in name}
    assert {int(name.partition(f"{path}.")[2].partition(".")[0]) for name in own} == {2, 3}
    assert not any(part in name for name in names for part in BEFORE[kind].split("|"))
    assert len(own) > 12


@pytest.mark.parametrize("kind", CONFIGS)
def test_the_scoring_pass_goes_on_from_the_routing_pass(directory: Callable[[str], Path], kind: str) -> None:
    whole, short = (TwinModel.from_pretrained(directory(kind)) for _ in range(2))
    never(whole)
    tasks = [["cola", "mnli"][row % 2] for row in range(6)]
    runs = [counted(twin) for twin in (whole, short)]
    expected, found = (twin(**batch(6), task=tasks).logits for twin in (whole, short))
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
    assert [runs[0][block] for block in range(DEPTH)] == [12, 12, 6, 6]
    assert [runs[1][block] for block in range(DEPTH)] == [6] * DEPTH
    again = short(**batch(6), task=tasks, fusion_weights=torch.ones(6, 2)).logits
    torch.testing.assert_close(again, whole(**batch(6), task=tasks, fusion_weights=torch.ones(6, 2)).logits)


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize("room", [2**30, 1000])
def test_a_list_of_rows_goes_on_in_other_batches(
    directory: Callable[[str], Path], kind: str, room: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows are routed and scored in batches of other sizes, and those without room for their state run whole."""
    monkeypatch.setattr(going_on, "KEPT_BYTES", room)
    whole, short = (TwinModel.from_pretrained(directory(kind)) for _ in range(2))
    never(whole)
    rows = [("the cat sat on a dog", None), ("a big bird", None), ("it is red", None), ("who ran", None)] * 2
    tasks = ["cola"] * 4 + ["mnli"] * 4
    runs = [counted(twin) for twin in (whole, short)]
    expected, found = (twin.classify(rows, tasks, batch_size=3) for twin in (whole, short))
    for one, other in zip(found, expected, strict=True):
        assert one.head == other.head
        torch.testing.assert_close(one.logits, other.logits, rtol=1e-6, atol=1e-6)
    assert runs[0][0] == 4 + 8
    assert runs[1][0] == 4 if room > 1000 else 4 < runs[1][0] <= 12
    assert runs[1][3] == runs[0][3] == 8
    assert going_on.States.current() is None


def test_only_states_that_no_expert_changes_are_gone_on_from(
    directory: Callable[[str], Path], recipes: dict[str, dict[str, Any]], tmp_path: Path
) -> None:
    twin: Any = TwinModel.from_pretrained(directory("bert"))
    assert going_on.latest_start(twin.backbone).layer == 2
    paper = TwinModel.from_pretrained(directory("bert"), protocol="paper")
    assert going_on.latest_start(paper.backbone).layer == 0  # its biases are all the true task's
    higher: Any = TwinModel.from_pretrained(directory("bert"))
    higher.router.config = dataclasses.replace(higher.router.config, layer=3)
    runs = counted(higher)
    higher(**batch(3), task="cola")
    assert [runs[block] for block in range(DEPTH)] == [6, 6, 6, 3]
    plain = TwinModel.from_pretrained(built({**recipes["bert"], "router": None}, tmp_path / "plain"))
    assert going_on.latest_start(plain.backbone).layer == 0


def test_an_embedding_that_shares_its_weight_is_changed_as_well() -> None:
    """BART's encoder has its own module for the table that an expert changes under another name."""
    config = transformers.BartConfig(
        vocab_size=40, d_model=16, encoder_layers=3, decoder_layers=1, encoder_ffn_dim=8, decoder_ffn_dim=8
    )
    config.encoder_attention_heads = config.decoder_attention_heads = 2
    model = transformers.BartForSequenceClassification(config).eval()
    table = {"model.shared.weight": model.model.shared.weight.detach()}
    changed = {name: tensor + torch.randn_like(tensor) for name, tensor in table.items()}
    with install(model, {"mnli": exclusive_vector(changed, table, rank=4)}).shared():
        assert going_on.latest_start(model.base_model).layer == 0


def test_biases_of_relative_positions_are_below_every_layer() -> None:
    """MPNet's encoder looks them up before its first block."""
    config = transformers.MPNetConfig(
        vocab_size=40, hidden_size=24, num_hidden_layers=3, num_attention_heads=2, intermediate_size=40
    )
    model = transformers.AutoModelForSequenceClassification.from_config(config).eval()
    below = going_on.parameters_below(model, model.base_model, 1)
    blocks = {name for name in below if name.startswith("mpnet.encoder.layer.0.")}
    others = {name for name in below - blocks if "embeddings" not in name}
    assert others == {"mpnet.encoder.relative_attention_bias.weight"}
    assert blocks == {name for name, _ in model.named_parameters() if name.startswith("mpnet.encoder.layer.0.")}
    every = {name for name, _ in model.named_parameters() if "embeddings" in name}
    assert below - blocks - others == every


def test_language_models_have_layers_below_too(causal_families: Any, seq2seq_families: Any, tmp_path: Path) -> None:
    """Of an encoder-decoder they are the encoder's, and the decoder keeps its own."""
    for family, block, table in (
        (causal_families("llama"), "model.layers.{}.", "model.embed_tokens."),
        (seq2seq_families("t5"), "encoder.block.{}.", "shared."),
    ):
        recipe = {**family.recipe, "exclusive": {"rank": 3, "from_layer": 1}, "router": None}
        twin = built(recipe, tmp_path / family.kind)
        names = {name for own in load_parts(twin).exclusive.values() for name in own.names()}
        every = {name for name, _ in family.base.named_parameters()}
        below = {name for name in every if name.startswith((block.format(0), table))}
        assert below
        assert names == every - below
        assert TwinModel.from_pretrained(twin)


def test_a_layer_that_leaves_nothing_is_refused(recipes: dict[str, dict[str, Any]], tmp_path: Path) -> None:
    recipe = {**recipes["bert"], "exclusive": {"rank": 3, "from_layer": DEPTH}}
    with pytest.raises(InputError, match=r"exclusive.from_layer 4: the base model has 4 blocks; give 0 to 3"):
        built(recipe, tmp_path / "twin")
    assert Recipe.model_validate({**recipe, "exclusive": {"rank": 3, "from_layer": 0}})


def test_a_router_on_exclusive_vectors_reads_layers_that_have_some(
    recipes: dict[str, dict[str, Any]], tmp_path: Path
) -> None:
    recipe = {**recipes["bert"], "exclusive": {"rank": 3, "from_layer": 2}}
    projection = {**recipe["router"], "kind": "projection"}
    twin: Any = TwinModel.from_pretrained(
        built({**recipe, "router": {**projection, "layer": "auto"}}, tmp_path / "auto")
    )
    assert twin.router.config.layer in (2, 3)
    with pytest.raises(
        InputError, match=r"router.layer 1: .* needs exclusive vectors in the block above it; 2 to 3, or auto"
    ):
        built({**recipe, "router": {**projection, "layer": 1}}, tmp_path / "twin")
    entries = {"exclusive": {"kind": "magnitude", "density": 0.1}, "router": {**projection, "layer": 1}}
    with pytest.raises(InputError, match=r"router.kind projection: .* exclusive.kind magnitude has none"):
        built({**recipe, **entries}, tmp_path / "twin")

"""The protocols: `paper` against an independent re-statement of the authors' formulas; `routed` heads."""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.support.dense import batch
from tests.support.families import built, make_family
from twin_bench import InputError, TwinModel
from twin_bench.contenders.storage import twin_bytes
from twin_bench.files import digest
from twin_bench.twin.directory import load_parts

QUERY_A = "base_model.model.encoder.layer.0.attention.self.query.lora_A.weight"
LEFT_OUT = (re.compile(r".*classifier.*"), re.compile(r".*bias.*"))


@pytest.fixture
def twin_directory(twins: Any) -> Path:
    return twins("roberta")


def authors_logits(
    family: Any,
    router_logits: torch.Tensor,
    true_task: str,
    inputs: dict[str, torch.Tensor],
    rate: float = 0.5,
    shared_alone: tuple[str, ...] = (),
) -> Any:
    """Re-state the authors' evaluation of one sample, dense weights throughout.

    Task arithmetic over everything but classifiers and biases; SVD to int((1 - rate) * min(m, n)) of 2-D
    tensors; the sample's weights from softmax; head and all biases from its true task's fine-tuned model.
    Parameters whose names begin with one of `shared_alone` have no exclusive vector, which the authors never do.
    """
    merged_names = [n for n, _ in family.base.named_parameters() if not any(p.match(n) for p in LEFT_OUT)]
    base = dict(family.base.named_parameters())
    experts = {task: dict(model.named_parameters()) for task, model in family.experts.items()}
    weights = router_logits.double().softmax(dim=-1)
    model: Any = copy.deepcopy(family.experts[true_task]).double()
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name in merged_names:
            shared = base[name] + 0.29 * sum(expert[name] - base[name] for expert in experts.values())
            fused = shared.double()
            kept = () if name.startswith(shared_alone or ("none",)) else zip(weights, experts.values(), strict=True)
            for weight, expert in kept:
                exclusive = (expert[name] - shared).double()
                if exclusive.ndim == 2:
                    U, S, V = torch.svd(exclusive)
                    k = int((1 - rate) * min(exclusive.shape))
                    exclusive = U[:, :k] @ torch.diag(S[:k]) @ V[:, :k].T
                fused = fused + weight * exclusive
            parameters[name].copy_(fused)
        return model(**inputs).logits[0]


@pytest.mark.parametrize("sharpness", [0.5, 5.0])
def test_paper_protocol_is_the_authors_arithmetic(families: Any, twin_directory: Path, sharpness: float) -> None:
    family = families("roberta")
    twin = TwinModel.from_pretrained(twin_directory, protocol="paper")
    inputs = batch(6)
    router_logits = sharpness * torch.randn(6, 3, generator=torch.Generator().manual_seed(5))
    tasks = [list(family.experts)[row % 3] for row in range(6)]
    found = twin(**inputs, fusion_weights=router_logits.softmax(dim=1), task=tasks).logits
    for row, task in enumerate(tasks):
        sample = {name: tensor[row : row + 1] for name, tensor in inputs.items()}
        expected = authors_logits(family, router_logits[row], task, sample)
        torch.testing.assert_close(found[row, : len(expected)].double(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("rate", "rank"), [(0.9, 1), (0.8, 3), (0.7, 6)])
def test_paper_takes_the_authors_rank(tmp_path: Path, rate: float, rank: int) -> None:
    """At width 20 the authors' floating-point rank is one below that of density 0.1 and 0.2, and not below 0.3's."""
    family = make_family(tmp_path, "roberta", config={"hidden_size": 20})
    directory = built(
        {**family.recipe, "exclusive": {"density": round(1 - rate, 1)}, "router": None}, tmp_path / "twin"
    )
    assert load_file(directory / "experts/cola/adapter_model.safetensors")[QUERY_A].shape[0] == round(20 * (1 - rate))
    twin = TwinModel.from_pretrained(directory, protocol="paper")
    assert max(layer.ranks for layer in twin.fusion.layers) == (rank,) * 3
    inputs, router_logits = batch(6), 5.0 * torch.randn(6, 3, generator=torch.Generator().manual_seed(5))
    tasks = [list(family.experts)[row % 3] for row in range(6)]
    found = twin(**inputs, fusion_weights=router_logits.softmax(dim=1), task=tasks).logits
    for row, task in enumerate(tasks):
        sample = {name: tensor[row : row + 1] for name, tensor in inputs.items()}
        expected = authors_logits(family, router_logits[row], task, sample, rate)
        torch.testing.assert_close(found[row, : len(expected)].double(), expected, rtol=1e-4, atol=1e-5)


def test_paper_takes_all_biases_of_the_true_task_also_below_a_layer(families: Any, tmp_path: Path) -> None:
    family, below = families("roberta"), ("roberta.embeddings.", "roberta.encoder.layer.0.")
    recipe = {**family.recipe, "exclusive": {"density": 0.5, "from_layer": 1}, "router": None}
    directory = built(recipe, tmp_path / "twin")
    twin = TwinModel.from_pretrained(directory, protocol="paper")
    inputs, logits = batch(3), torch.randn(3, 3, generator=torch.Generator().manual_seed(0))
    tasks = ["cola", "stsb", "mnli"]
    found = twin(**inputs, task=tasks, fusion_weights=torch.softmax(logits, dim=1)).logits
    for row, task in enumerate(tasks):
        sample = {
            name: tensor[row : row + 1, : int(inputs["attention_mask"][row].sum())] for name, tensor in inputs.items()
        }
        expected = authors_logits(family, logits[row], task, sample, shared_alone=below)
        torch.testing.assert_close(found[row, : len(expected)].double(), expected, rtol=1e-4, atol=1e-5)
    standard = {name for own in load_parts(directory).exclusive.values() for name in own.names()}
    assert not any(name.startswith(below) for name in standard)  # the other protocols store and read none of it
    assert twin_bytes(directory, "paper", routed=True) > twin_bytes(directory, "standard", routed=True)
    manifest = json.loads((directory / "twin.json").read_text())
    del manifest["files"]["router/paper/left_out.safetensors"], manifest["sha256"]
    (directory / "router" / "paper" / "left_out.safetensors").unlink()
    (directory / "twin.json").write_text(json.dumps({**manifest, "sha256": digest(manifest)}))
    with pytest.raises(InputError, match="built without what the paper protocol needs; build it again"):
        TwinModel.from_pretrained(directory, protocol="paper")


def test_paper_biases_are_not_the_fused_ones(families: Any, twin_directory: Path) -> None:
    """The protocols differ on the same weights: the test above can't pass by running `standard`."""
    inputs, weights = batch(3), torch.full((3, 3), 1 / 3)
    paper, standard = (
        TwinModel.from_pretrained(twin_directory, protocol=p)(**inputs, fusion_weights=weights, task="cola").logits
        for p in ("paper", "standard")
    )
    assert (paper - standard).abs().max() > 1e-3


def test_routed_takes_the_head_of_the_largest_weight(families: Any, twin_directory: Path) -> None:
    standard = TwinModel.from_pretrained(twin_directory)
    routed = TwinModel.from_pretrained(twin_directory, protocol="routed")
    inputs = batch(3)
    weights = torch.tensor([[0.6, 0.3, 0.1], [0.2, 0.5, 0.3], [0.1, 0.2, 0.7]])
    heads = ["cola", "stsb", "mnli"]
    expected = standard(**inputs, fusion_weights=weights, task=heads).logits
    torch.testing.assert_close(routed(**inputs, fusion_weights=weights).logits, expected)
    told_wrong = routed(**inputs, fusion_weights=weights, task="cola").logits
    torch.testing.assert_close(told_wrong, expected)


def test_the_task_decides_no_more_than_the_head(twin_directory: Path, families: Any) -> None:
    """Under `standard` the fusion weights come from the router alone: task ids leak nowhere else."""
    twin = TwinModel.from_pretrained(twin_directory)
    texts = [("the cat sat", None), ("why did the bird", None)]
    first, second = (twin.classify(texts, [task] * 2) for task in ("cola", "mnli"))
    assert [p.head for p in first + second] == ["cola"] * 2 + ["mnli"] * 2
    with torch.no_grad():
        encoded = twin.encode(texts)
        weights = twin.route_all(encoded, [])
    for given in ("cola", "mnli"):
        direct = twin.classify(texts, [given] * 2, fusion_weights=weights)
        for a, b in zip(direct, first if given == "cola" else second, strict=True):
            torch.testing.assert_close(a.logits, b.logits)


def test_protocol_errors(twin_directory: Path) -> None:
    with pytest.raises(InputError, match="did you mean 'routed'"):
        TwinModel.from_pretrained(twin_directory, protocol="route")  # type: ignore[arg-type]
    twin = TwinModel.from_pretrained(twin_directory, protocol="paper")
    with pytest.raises(InputError, match=r"validation\.jsonl"):
        twin.route(**batch(2))
    standard = TwinModel.from_pretrained(twin_directory)
    with pytest.raises(InputError, match="name it with task="):
        standard(**batch(2))
    with pytest.raises(InputError, match="did you mean 'cola'"):
        standard(**batch(2), task="colla")
    with pytest.raises(InputError, match=r"\(2, 2\), not \(rows, experts\) = \(2, 3\)"):
        standard(**batch(2), task="cola", fusion_weights=torch.ones(2, 2))

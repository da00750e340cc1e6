"""The expert that a router chooses, against that expert's own model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.contenders import all_served, served
from tests.support.rows import write_generative_rows
from twin_bench.contenders.storage import data_bytes
from twin_bench.data.rows import read_router_rows
from twin_bench.errors import InputError, UnsuitedError
from twin_bench.twin.causal import TwinCausalLM
from twin_bench.twin.classifier import TwinClassifier
from twin_bench.twin.requests import Generate, Score, generate, score

EXACT = {"rtol": 1e-5, "atol": 1e-5}
METHODS = [
    {"twin": {"router": {"epochs": 10, "layer": 0, "paper": False}}},
    {"routed_expert": {"router": {"epochs": 10, "layer": 0, "paper": False}}},
]


def suite_of(family: Any, data: Path, **changes: Any) -> dict[str, Any]:
    """Return a suite whose router is sure: each expert's rows have words of their own."""
    models = {key: family.recipe[key] for key in ("base_model", "experts")}
    rows = {"data": str(data), "router": {"data": str(family.root / "router.jsonl")}}
    return {"name": "tiny", "tasks": list(family.experts), "methods": METHODS, **models, **rows, **changes}


@pytest.fixture
def suite(tiny: dict[str, Any], families: Any) -> dict[str, Any]:
    return suite_of(families("bert"), tiny["data"])


def texts_of(family: Any) -> list[str]:
    """Return two texts of each expert, by turns, of those that the router was trained to tell apart."""
    rows = read_router_rows(family.root / "router.jsonl", list(family.experts)).train
    own = [[row.text for row in rows if row.task == task] for task in family.experts]
    return [texts[place] for place in (3, 11) for texts in own]


@pytest.mark.parametrize("protocol", ["standard", "routed"])
def test_a_mixed_batch_has_each_chosen_experts_own_logits(
    protocol: Any, suite: dict[str, Any], families: Any, tmp_path: Path
) -> None:
    family = families("bert")
    (made,) = all_served(suite, "routed_expert", tmp_path, None, protocol)
    twin, names = made.twin, list(family.experts)
    assert isinstance(twin, TwinClassifier)
    encoded = twin.encode([(text, None) for text in texts_of(family)])
    weights = twin.route_all(encoded)
    chosen = [names[index] for index in weights.argmax(dim=1).tolist()]
    assert len(set(chosen)) == 3
    assert weights.sum() == weights.count_nonzero() == len(encoded)  # one each
    asked = ["mnli"] * len(encoded)
    inputs = twin.collate(encoded)
    together = twin(**inputs, task=asked).logits
    for row, (answer, name) in enumerate(zip(twin.answer(encoded, asked), chosen, strict=True)):
        model, head = family.experts[name], name if protocol == "routed" else "mnli"
        with torch.no_grad():
            pooled = model.bert(**twin.collate([encoded[row]])).pooler_output
            expected = family.experts[head].classifier(pooled)[0]
        assert answer.head == head
        torch.testing.assert_close(answer.logits, expected, **EXACT)
        torch.testing.assert_close(together[row, : len(expected)], expected, **EXACT)
    assert torch.equal(twin.route_all(encoded), weights)  # the shared expert is back in its place


def test_its_router_is_the_twins_and_both_are_one_build(suite: dict[str, Any], families: Any, tmp_path: Path) -> None:
    family = families("bert")
    plain = served(suite, "twin", tmp_path)
    made = served(suite, "routed_expert", tmp_path)
    (directory,) = (folder for folder in tmp_path.iterdir() if folder.is_dir())
    encoded = plain.twin.encode([(text, None) for text in texts_of(family)])
    assert torch.equal(plain.twin.route_all(encoded).argmax(dim=1), made.twin.route_all(encoded).argmax(dim=1))
    assert made.notes["router"] == plain.notes["router"]
    one = sum(parameter.numel() for parameter in family.base.base_model.parameters())
    heads = sum(p.numel() for model in family.experts.values() for p in model.classifier.parameters())
    router = data_bytes(directory / "router" / "router.safetensors")
    assert made.stored_bytes == 4 * (4 * one + heads) + router  # three experts, and the shared one for the router
    assert made.parameters == 4 * one
    assert made.build_seconds is not None
    assert plain.build_seconds is not None
    assert made.build_seconds > plain.build_seconds


def test_language_models_answer_whole_too(causal_families: Any, tmp_path: Path) -> None:
    family = causal_families("llama")
    longer = [{"routed_expert": {"router": {"epochs": 60, "layer": 0, "paper": False}}}]
    suite = suite_of(family, write_generative_rows(tmp_path / "rows"), methods=longer)
    twin = served(suite, "routed_expert", tmp_path / "work").twin
    assert isinstance(twin, TwinCausalLM)
    encoded, names = twin.encode([(text, None) for text in texts_of(family)]), list(family.experts)
    chosen = [names[index] for index in twin.route_all(encoded).argmax(dim=1).tolist()]
    assert len(set(chosen)) == 3
    contexts = [row["input_ids"] for row in encoded]
    scores = score(twin, [Score(ids, [7, 8]) for ids in contexts])
    texts = generate(twin, [Generate(ids, 3) for ids in contexts])
    for ids, name, found, made in zip(contexts, chosen, scores, texts, strict=True):
        model = family.experts[name]
        with torch.no_grad():
            logits = model(torch.tensor([[*ids, 7, 8]])).logits[0].log_softmax(dim=-1)
            own = model.generate(torch.tensor([ids]), max_new_tokens=3, do_sample=False)[0, len(ids) :]
        expected = torch.stack([logits[len(ids) - 1, 7], logits[len(ids), 8]])
        torch.testing.assert_close(found.log_probs, expected, **EXACT)
        assert list(made[0].tokens) == own.tolist()
    rows = twin.collate(encoded, padding_side="left")
    for row, (logits, name) in enumerate(zip(twin(**rows).logits, chosen, strict=True)):
        with torch.no_grad():
            alone = family.experts[name](torch.tensor([contexts[row]])).logits[0]
        torch.testing.assert_close(logits[-len(alone) :], alone, **EXACT)
    with pytest.raises(InputError, match=r"go to several whole experts .*give the rows one by one"):
        twin.generate(**rows, max_new_tokens=2)


def test_half_precision_serves_each_expert_as_it_is_loaded(
    suite: dict[str, Any], families: Any, tmp_path: Path
) -> None:
    family = families("bert")
    twin = served({**suite, "dtype": "bfloat16"}, "routed_expert", tmp_path).twin
    assert isinstance(twin, TwinClassifier)
    (encoded,) = twin.encode([(texts_of(family)[0], None)])
    one_hot = torch.eye(3)[1:2]
    (answer,) = twin.answer([encoded], ["stsb"], fusion_weights=one_hot)
    alone = type(family.base).from_pretrained(family.root / "stsb", dtype=torch.bfloat16)
    with torch.no_grad():
        expected = alone(**twin.collate([encoded])).logits[0].float()
    torch.testing.assert_close(answer.logits, expected, rtol=0, atol=0)


def test_an_expert_that_would_be_rounded_is_refused(suite: dict[str, Any], families: Any, tmp_path: Path) -> None:
    base = type(families("bert").base).from_pretrained(families("bert").root / "base", dtype=torch.float16)
    base.save_pretrained(tmp_path / "base")
    for file in (families("bert").root / "base").glob("*token*"):
        (tmp_path / "base" / file.name).write_bytes(file.read_bytes())
    with pytest.raises(
        UnsuitedError, match=r"is served in torch\.float16, which rounds it; give the suite dtype: float"
    ):
        served({**suite, "base_model": str(tmp_path / "base")}, "routed_expert", tmp_path / "work")


@pytest.mark.parametrize(
    ("option", "said"), [({"exclusive": {"rank": 1}}, "exclusive"), ({"weights": "task"}, "weigh")]
)
def test_options_of_a_twin_that_it_has_not_are_refused(option: Any, said: str, suite: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=said):
        all_served({**suite, "methods": [{"routed_expert": option}]}, "routed_expert", Path("none"))

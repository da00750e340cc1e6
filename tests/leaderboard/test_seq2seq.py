"""Encoder-decoders on a leaderboard: every method's model is the merge in memory, and lm-eval scores it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import twin_bench
from tests.support.lm_eval_requests import generated, scored
from tests.support.merges import EXPERTS, STATIC
from tests.support.rows import task_rows, write_generative_rows
from tests.support.suites import rows_of, run
from twin_bench import InputError, TwinModel
from twin_bench.bench.run import bench
from twin_bench.checkpoints.sources import open_sources
from twin_bench.contenders import Context, contenders, rehearse
from twin_bench.doctor import twin as examined
from twin_bench.merging.by_name import merge_lazily
from twin_bench.merging.registry import find_method
from twin_bench.serving.engine import engine
from twin_bench.serving.settings import TwinSettings
from twin_bench.twin.seq2seq import TwinSeq2Seq
from twin_bench_helm.config import write_helm_config
from twin_bench_lm_eval.model import serving

SOURCE, TARGET = torch.tensor([[5, 6, 7, 8, 3]]), torch.tensor([[9, 10, 11]])


@pytest.fixture(scope="module")
def context(seq2seq_families: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Return a function from a method's name, its options and how many experts it takes to its context."""
    family, root = seq2seq_families("flan-t5"), tmp_path_factory.mktemp("board")
    data = write_generative_rows(root / "data")

    def of(name: str, options: dict[str, Any] | None = None, experts: int = 3) -> Context:
        paths = dict(list(family.recipe["experts"].items())[:experts])
        sources = open_sources(family.recipe["base_model"], paths)
        base = family.recipe["base_model"]
        settings = {**find_method(name).defaults, **(options or {})}
        return Context(name, settings, "standard", tuple(task_rows(data, *paths)), base, paths, sources, root / name)

    return of


def logits(twin: TwinModel, **options: Any) -> torch.Tensor:
    return twin(SOURCE, labels=TARGET, **options).logits


@pytest.mark.parametrize("name", STATIC)
def test_static_methods_merge_all_of_a_model(context: Any, seq2seq_families: Any, name: str) -> None:
    """The output layer of its own too, which transformers 5 says is tied to the embeddings."""
    family = seq2seq_families("flan-t5")
    asked = context(name, {"steps": 3} if name == "wudi" else {}, EXPERTS.get(name, 3))
    merged = merge_lazily(name, asked.sources.base, asked.sources.experts, **asked.settings)
    tensors = {key: tensor.detach() for key, tensor in family.base.named_parameters()}
    tuned = {task: dict(family.experts[task].named_parameters()) for task in asked.experts}
    expected = twin_bench.merge(name, tensors, tuned, **asked.settings)
    assert merged.keys() == expected.keys() >= {"lm_head.weight", "shared.weight"}
    for key, tensor in expected.items():
        assert torch.equal(merged[key], tensor)


@pytest.mark.parametrize("name", ["task_arithmetic", "regmean", "fisher"])
def test_a_merged_model_answers(context: Any, seq2seq_families: Any, name: str) -> None:
    asked = context(name)
    rehearse(find_method(name), asked)
    (contender,) = contenders(find_method(name), asked)
    assert isinstance(contender.twin, TwinSeq2Seq)
    assert logits(contender.twin).isfinite().all()
    parameters = dict(contender.twin.model.named_parameters())
    for key, tensor in seq2seq_families("flan-t5").base.named_parameters():
        assert not torch.equal(parameters[key], tensor)


def test_bounds_and_twins_answer_as_their_models(context: Any, seq2seq_families: Any, tmp_path: Path) -> None:
    family = seq2seq_families("flan-t5")
    for contender in contenders(find_method("experts"), context("experts")):
        (task,) = contender.tasks
        with torch.no_grad():
            expected = family.experts[task](SOURCE, labels=TARGET).logits
        torch.testing.assert_close(logits(contender.twin), expected)
    asked = context("twin", find_method("twin").checked({"exclusive": {"density": 0.5}, "router": {"epochs": 2}}))
    (contender,) = contenders(find_method("twin"), asked)
    assert contender.notes["router"]["accuracy"] >= 0
    model = serving(contender.twin, task="mmlu", batch_size=2, max_length=None)
    twin: Any = contender.twin
    ids = model.tok_encode(" the cat", add_special_tokens=False)
    source = torch.tensor([model.tok_encode("a dog sat")])
    expected = twin(source, labels=torch.tensor([ids])).logits[0].log_softmax(dim=-1)[range(len(ids)), ids].sum()
    ((found, _),) = model.loglikelihood(scored([("a dog sat", " the cat")]))
    assert found == pytest.approx(float(expected), abs=1e-5)
    asked_once = dict(model.fusion_weights)
    model.fusion_weights.clear()
    assert len(model.generate_until(generated(["a dog sat", "the cat"]))) == 2
    weights = twin.route_all(twin.encode([("a dog sat", None)]))[0].tolist()
    for own in (asked_once, model.fusion_weights):  # of the first request about the document
        assert own == {(None, None): pytest.approx(weights, abs=1e-6)}
    assert model.model_seconds > 0
    (directory,) = [path for path in asked.workspace.iterdir() if path.is_dir()]
    assert any("an encoder-decoder" in finding.says for finding in examined(directory))
    says = "an encoder-decoder's twin does not generate text behind a prompt"
    with pytest.raises(InputError, match=says):
        write_helm_config(directory, "new", tmp_path)
    with pytest.raises(InputError, match=says):
        engine(str(directory), TwinSettings())
    with pytest.raises(InputError, match=says):
        bench(directory, tmp_path)


def test_a_suite_takes_encoder_decoders_where_it_takes_language_models(seq2seq_families: Any, tmp_path: Path) -> None:
    recipe = seq2seq_families("bart").recipe
    suite = {
        "name": "tiny-seq2seq",
        "base_model": recipe["base_model"],
        "experts": recipe["experts"],
        "data": str(write_generative_rows(tmp_path / "data")),
        "tasks": ["mmlu", "cnn_dailymail"],
        "protocol": ["standard", "routed"],
        "rows": 2,
        "methods": ["task_arithmetic", {"twin": {"router": {"epochs": 1}}}],
    }
    assert run(suite, tmp_path) == 0
    found = {(method, task) for protocol, method, task in rows_of(tmp_path) if protocol == "standard"}
    assert found >= {(method, task) for method in ("experts", "task_arithmetic", "twin") for task in suite["tasks"]}

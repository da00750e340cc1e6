"""Fisher diagonals and Gram matrices against second ways to take them, on tiny random models."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.func import functional_call, jacrev
from transformers.pytorch_utils import Conv1D

import twin_bench
from tests.support.families import Family
from tests.support.models import WORDS, tiny_causal, tiny_classifier, tiny_seq2seq
from tests.support.rows import task_rows, write_generative_rows
from twin_bench.checkpoints.sources import open_sources
from twin_bench.errors import InputError, UnsuitedError
from twin_bench.merging.calibration import Example, calibrate, calibration_examples, fisher_diagonals, gram_matrices


def examples(vocabulary: int = 27, answer: int = 0) -> list[Example]:
    """Rows of several lengths."""
    generator = torch.Generator().manual_seed(0)
    return [
        Example({"input_ids": torch.randint(4, vocabulary, (1, length), generator=generator)}, answer)
        for length in (3, 7, 5, 11)
    ]


def fisher_by_jacobians(model: Any, rows: list[Example]) -> dict[str, torch.Tensor]:
    """Return mean_x sum_y p_y (J_y - sum_k p_k J_k)^2 of the logits' Jacobian J: d log p_y is J_y - sum_k p_k J_k."""
    model = model.double()
    parameters = {name: parameter.detach() for name, parameter in model.named_parameters()}
    total = {name: torch.zeros_like(parameter) for name, parameter in parameters.items()}
    for row in rows:

        def logits_of(parameters: dict[str, torch.Tensor], row: Example = row) -> torch.Tensor:
            return functional_call(model, parameters, (), dict(row.inputs)).logits[0]

        probabilities = logits_of(parameters).softmax(dim=0)
        for name, jacobian in jacrev(logits_of)(parameters).items():
            centred = jacobian - torch.tensordot(probabilities, jacobian, dims=1)
            total[name] += torch.tensordot(probabilities, centred.square(), dims=1) / len(rows)
    return total


@pytest.mark.parametrize("kind", ["bert", "roberta", "gpt2"])
def test_a_classifiers_fisher_is_the_expectation_over_its_own_labels(kind: str) -> None:
    rows = examples()
    found = fisher_diagonals(tiny_classifier(kind, num_labels=3), rows)
    expected = fisher_by_jacobians(tiny_classifier(kind, num_labels=3), rows)
    assert found.keys() == expected.keys()
    for name, diagonal in found.items():
        torch.testing.assert_close(diagonal.double(), expected[name], rtol=1e-3, atol=1e-9)
    assert sum(diagonal.sum() for diagonal in found.values()) > 0


def test_a_regressions_fisher_is_that_of_unit_variance() -> None:
    """E_y (y - f)^2 (df)^2 with y drawn from N(f, 1) is (df)^2, whatever the row's own label."""
    model, rows = tiny_classifier("bert", num_labels=1).double(), examples()
    parameters = {name: parameter.detach() for name, parameter in model.named_parameters()}
    jacobians = [
        jacrev(lambda p, row=row: functional_call(model, p, (), dict(row.inputs)).logits[0, 0])(parameters)
        for row in rows
    ]
    for name, diagonal in fisher_diagonals(tiny_classifier("bert", num_labels=1), rows).items():
        expected = torch.stack([jacobian[name].square() for jacobian in jacobians]).mean(dim=0)
        torch.testing.assert_close(diagonal.double(), expected, rtol=1e-3, atol=1e-9)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_a_language_models_fisher_is_that_of_drawn_labels(kind: str) -> None:
    """In expectation over draws: the sum over the answer's positions of each position's exact Fisher."""
    model = tiny_causal(kind)
    with torch.no_grad():  # a peaked distribution: draws agree sooner
        model.get_output_embeddings().weight *= 3
    row = examples(100, answer=3)[1]
    watched = "transformer.ln_f.bias" if kind == "gpt2" else "model.norm.weight"
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name == watched)
    draws = 700
    found = fisher_diagonals(model, [row] * draws)
    assert found.keys() == {watched}
    same = fisher_diagonals(model, [row] * 5, seed=4)[watched]
    assert torch.equal(same, fisher_diagonals(model, [row] * 5, seed=4)[watched])
    assert not torch.equal(same, fisher_diagonals(model, [row] * 5, seed=5)[watched])

    def logits_of(parameter: torch.Tensor) -> torch.Tensor:
        return functional_call(model, {watched: parameter}, (), dict(row.inputs)).logits[0, -4:-1]

    parameter = model.get_parameter(watched).detach()
    probabilities, jacobian = logits_of(parameter).softmax(dim=-1), jacrev(logits_of)(parameter)
    centred = jacobian - torch.einsum("pv,pvi->pi", probabilities, jacobian)[:, None]
    exact = torch.einsum("pv,pvi->i", probabilities, centred.square())
    assert torch.corrcoef(torch.stack([found[watched], exact]))[0, 1] > 0.9
    torch.testing.assert_close(found[watched].sum(), exact.sum(), rtol=0.2, atol=0)


@pytest.mark.parametrize(
    "make", [lambda: tiny_classifier("bert"), lambda: tiny_classifier("gpt2"), lambda: tiny_causal("qwen2")]
)
def test_grams_are_of_the_layers_inputs(make: Any) -> None:
    model, rows = make(), examples()
    layers = {path: module for path, module in model.named_modules() if isinstance(module, torch.nn.Linear | Conv1D)}
    seen: dict[str, list[torch.Tensor]] = {path: [] for path in layers}
    forwards = {path: module.forward for path, module in layers.items()}

    def recording(path: str) -> Any:
        def forward(x: torch.Tensor) -> torch.Tensor:
            seen[path] += list(x.detach().reshape(-1, x.shape[-1]).double())
            return forwards[path](x)

        return forward

    for path, module in layers.items():
        module.forward = recording(path)
    found = gram_matrices(model, rows)
    for path, module in layers.items():
        name = f"{path}.weight" + ".T" * isinstance(module, Conv1D)
        expected = sum(torch.outer(x, x) for x in seen[path]) / len(seen[path])
        torch.testing.assert_close(found.pop(name).double(), expected, rtol=1e-5, atol=1e-7)
    assert not found


def test_an_encoder_decoders_statistics_are_of_its_prompts_and_targets(seq2seq_families: Any, tmp_path: Path) -> None:
    """Fisher: the squared gradient of drawn targets' log-probability. Gram: cross-attention reads the encoder."""
    recipe = seq2seq_families("flan-t5").recipe
    sources = open_sources(recipe["base_model"], recipe["experts"])
    data = write_generative_rows(tmp_path / "rows")
    (row,) = calibration_examples(task_rows(data, "cnn_dailymail"), sources, rows=1, max_length=40)
    source, target = row.inputs["input_ids"], row.inputs["labels"]
    assert source.shape == (1, 40)
    answer = sources.tokenizer.decode(target[0])
    assert answer.endswith("[SEP]")
    assert answer.removesuffix("[SEP]") in (data / "cnn_dailymail" / "train.jsonl").read_text()
    model = tiny_seq2seq("flan-t5")
    found = fisher_diagonals(model, [row], seed=4)
    log_probabilities = model(input_ids=source, labels=target).logits[0].log_softmax(dim=-1)
    drawn = torch.multinomial(log_probabilities.detach().exp(), 1, generator=torch.Generator().manual_seed(4))
    log_probabilities.gather(1, drawn).sum().backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(found[name], parameter.grad.square(), rtol=1e-4, atol=1e-9)
    x = model.get_encoder()(input_ids=source).last_hidden_state[0].detach().double()
    gram = gram_matrices(model, [row])["decoder.block.0.layer.1.EncDecAttention.k.weight"]
    torch.testing.assert_close(gram.double(), x.T @ x / len(x), rtol=1e-5, atol=1e-6)


def test_a_tied_output_layer_has_no_gram_of_its_own() -> None:
    found = gram_matrices(tiny_causal("llama"), examples())
    assert "lm_head.weight" not in found
    assert "model.layers.0.mlp.down_proj.weight" in found


def test_regmean_of_conv1d_layers_fits_the_experts_outputs() -> None:
    """GPT-2: of all weights of a layer, those with the least squared distance to the experts' outputs, alpha 1."""
    base = tiny_classifier("gpt2")
    experts = {task: tiny_classifier("gpt2", seed=seed, like=base) for seed, task in enumerate(("a", "b"), 1)}
    rows = examples() * 3
    name, path = "transformer.h.0.attn.c_proj.weight", "transformer.h.0.attn.c_proj"
    inputs: dict[str, torch.Tensor] = {}
    for task, expert in experts.items():
        kept: list[torch.Tensor] = []
        hook = expert.get_submodule(path).register_forward_pre_hook(lambda _, args, kept=kept: kept.append(args[0]))
        for row in rows:
            expert(**row.inputs)
        hook.remove()
        inputs[task] = torch.cat([x.detach().flatten(0, -2).double() for x in kept])
    tuned = {task: {name: expert.get_parameter(name).detach()} for task, expert in experts.items()}
    statistics = {task: gram_matrices(expert, rows) for task, expert in experts.items()}
    one = {name: base.get_parameter(name).detach()}
    merged = twin_bench.merge("regmean", one, tuned, statistics=statistics, alpha=1.0)[name].double()
    gradient = sum(x.T @ (x @ (merged - tuned[task][name].double())) for task, x in inputs.items())
    scale = sum((x.T @ x @ tuned[task][name].double()).abs().max() for task, x in inputs.items())
    assert gradient.abs().max() < 1e-4 * scale  # the normal equations: zero at the minimum


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("rows")
    for task, fields in {
        "cola": ["sentence"],
        "stsb": ["sentence1", "sentence2"],
        "mnli": ["premise", "hypothesis"],
    }.items():
        (root / task).mkdir()
        rows = [{field: " ".join(WORDS[i : i + 5]) for field in fields} | {"label": i % 2} for i in range(9)]
        (root / task / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return root


def test_rows_are_drawn_by_the_seed_and_read_as_the_expert_reads_them(families: Any, data: Path) -> None:
    sources = open_sources(families("bert").recipe["base_model"], families("bert").recipe["experts"])
    drawn = {seed: calibration_examples(task_rows(data, "mnli"), sources, rows=6, seed=seed) for seed in (0, 1)}
    assert [len(rows) for rows in drawn.values()] == [6, 6]
    ids = {seed: [row.inputs["input_ids"].tolist() for row in rows] for seed, rows in drawn.items()}
    again = calibration_examples(task_rows(data, "mnli"), sources, rows=6, seed=0)
    assert ids[0] == [row.inputs["input_ids"].tolist() for row in again] != ids[1]
    assert len(calibration_examples(task_rows(data, "mnli"), sources)) == 9
    texts = [" ".join(WORDS[i : i + 5]) for i in range(9)]
    pairs = [sources.tokenizer(text, text)["input_ids"] for text in texts]
    assert all(row in pairs for (row,) in ids[0])
    assert drawn[0][0].inputs["token_type_ids"].any()
    short = calibration_examples(task_rows(data, "mnli"), sources, max_length=4)
    assert {row.inputs["input_ids"].shape for row in short} == {(1, 4)}


def test_a_generative_row_is_its_prompt_with_its_answer(wide_llama: Family, tmp_path: Path) -> None:
    data = write_generative_rows(tmp_path / "data")
    sources = open_sources(wide_llama.recipe["base_model"], wide_llama.recipe["experts"])
    for row in calibration_examples(task_rows(data, "bbq"), sources, rows=4):
        ids = row.inputs["input_ids"][0]
        assert sources.tokenizer.decode(ids[: -row.answer]).endswith("Answer:")
        assert sources.tokenizer.decode(ids[-row.answer :]).strip() in ("A", "B", "C")
    for row in calibration_examples(task_rows(data, "cnn_dailymail"), sources, rows=4, max_length=5):
        assert row.inputs["input_ids"].shape == (1, 5)
        assert row.answer == 4  # the first token has nothing before it that predicts it


@pytest.mark.parametrize("kind", ["fisher", "gram"])
def test_statistics_are_kept_and_are_those_of_the_expert_with_its_head(
    families: Any, data: Path, tmp_path: Path, kind: Any
) -> None:
    family = families("bert")
    sources = open_sources(family.recipe["base_model"], family.recipe["experts"])
    found = calibrate(kind, sources, task_rows(data, *sources.experts), tmp_path / "kept", rows=4, seed=2)
    assert found.rows == {"cola": 4, "stsb": 4, "mnli": 4}
    statistics = {"fisher": fisher_diagonals, "gram": gram_matrices}[kind]
    for task, model in family.experts.items():
        expected = statistics(model.float(), calibration_examples(task_rows(data, task), sources, rows=4, seed=2))
        assert set(found.statistics[task]) == {name for name in expected if name.startswith("bert.")}
        for name, tensor in found.statistics[task].items():
            torch.testing.assert_close(tensor, expected[name], rtol=1e-4, atol=1e-8)
    times = {file: file.stat().st_mtime_ns for file in (tmp_path / "kept").iterdir()}
    again = calibrate(kind, sources, task_rows(data, *sources.experts), tmp_path / "kept", rows=4, seed=2)
    assert again.taken == found.taken
    assert found.taken.peak_bytes is not None
    assert {file: file.stat().st_mtime_ns for file in (tmp_path / "kept").iterdir()} == times
    assert {file.name for file in times if not file.name.startswith(".")} == {
        "cola.safetensors",
        "stsb.safetensors",
        "mnli.safetensors",
    }


@pytest.mark.parametrize("kind", ["fisher", "gram"])
def test_statistics_that_overflow_are_not_kept(families: Any, data: Path, tmp_path: Path, kind: Any) -> None:
    """The expert's weights are finite, and its activations are not."""
    family = families("bert")
    shutil.copytree(family.root / "mnli", tmp_path / "mnli")
    file = tmp_path / "mnli" / "model.safetensors"
    tensors = load_file(file)
    key = "bert.encoder.layer.0.output.LayerNorm.weight"
    save_file({**tensors, key: torch.full_like(tensors[key], 3e38)}, file)
    sources = open_sources(family.recipe["base_model"], {"mnli": str(tmp_path / "mnli")})
    with pytest.raises(
        InputError, match=rf"{kind} statistics of expert 'mnli': tensor bert\.\S+ holds NaN or inf; that"
    ):
        calibrate(kind, sources, task_rows(data, *sources.experts), tmp_path / "kept", rows=2)
    assert not list((tmp_path / "kept").glob("*.safetensors"))


def test_rows_that_are_not_there(families: Any, data: Path, tmp_path: Path) -> None:
    recipe = families("bert").recipe
    sources = open_sources(recipe["base_model"], recipe["experts"])
    with pytest.raises(UnsuitedError, match=r"cola/train.jsonl: no such file; statistics are computed from"):
        calibrate("fisher", sources, task_rows(tmp_path, *sources.experts), tmp_path / "kept")
    (tmp_path / "cola").mkdir()
    (tmp_path / "cola" / "train.jsonl").write_text('{"sentense": "a cat"}\n')
    with pytest.raises(InputError, match="line 1: no field 'sentence'; did you mean 'sentense'"):
        calibrate("fisher", sources, task_rows(tmp_path, *sources.experts), tmp_path / "kept")
    assert not list((tmp_path / "kept").glob("*.safetensors"))

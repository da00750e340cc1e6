"""mergekit's files: the same result where the meaning is the same, one clear line where it is not."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from torch import Tensor

import twin_bench
from twin_bench import InputError
from twin_bench.cli import main
from twin_bench.merging.export import read_merge_recipe
from twin_bench.merging.recipe import MergeRecipe

SHAPES = {"tall": (40, 7), "wide": (5, 33), "vector": (19,), "square": (16, 16)}


def configuration(method: str, count: int = 3, **changes: Any) -> dict[str, Any]:
    models = [{"model": f"org/expert-{index}", "parameters": {"weight": 0.4}} for index in range(count)]
    return {"merge_method": method, "base_model": "org/base", "models": models, **changes}


def read(raw: dict[str, Any], folder: Path) -> tuple[MergeRecipe, str]:
    (folder / "mergekit.yaml").write_text(yaml.safe_dump(raw, sort_keys=False))
    return read_merge_recipe(folder / "mergekit.yaml")


def random_models(count: int = 3) -> tuple[dict[str, Tensor], dict[str, dict[str, Tensor]]]:
    generator = torch.Generator().manual_seed(0)
    base = {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}
    base["deficient"] = torch.outer(torch.arange(6.0), torch.ones(9))
    tuned = {
        f"expert-{index}": {name: t + 0.1 * torch.randn(t.shape, generator=generator) for name, t in base.items()}
        for index in range(count)
    }
    return base, tuned


def published(
    base: Tensor, experts: list[Tensor], weights: list[float], *, factor: float, normalize: bool, elects: bool
) -> Tensor:
    """mergekit's generalised task arithmetic, entry by entry, as its docs and code have it; nothing is sparsified."""
    result = base.double().flatten().clone()
    for entry in range(result.numel()):
        weighted = [
            w * float(e.flatten()[entry].double() - result[entry]) for w, e in zip(weights, experts, strict=True)
        ]
        sign = 1 if sum(weighted) >= 0 else -1
        kept = [i for i, value in enumerate(weighted) if not elects or value * sign > 0]
        divisor = sum(weights[i] for i in kept) if normalize else 1
        result[entry] += factor * sum(weighted[i] for i in kept) / (divisor or 1)
    return result.view(base.shape)


@pytest.mark.parametrize(
    ("method", "parameters", "formula"),
    [
        ("task_arithmetic", {}, {"factor": 1.0, "normalize": False, "elects": False}),
        ("task_arithmetic", {"lambda": 0.7}, {"factor": 0.7, "normalize": False, "elects": False}),
        ("task_arithmetic", {"normalize": True}, {"factor": 1.0, "normalize": True, "elects": False}),
        ("ties", {"lambda": 0.7}, {"factor": 0.7, "normalize": True, "elects": True}),
        ("ties", {"normalize": True, "density": 1.0}, {"factor": 1.0, "normalize": True, "elects": True}),
        ("dare_linear", {"lambda": 1.3}, {"factor": 1.3, "normalize": False, "elects": False}),
        ("dare_ties", {"normalize": True}, {"factor": 1.0, "normalize": True, "elects": True}),
    ],
)
def test_the_published_formula(
    tmp_path: Path, method: str, parameters: dict[str, Any], formula: dict[str, Any]
) -> None:
    """At density 1, mergekit's default, where neither trimming nor drawing tells the two apart."""
    recipe, _ = read(configuration(method, parameters=parameters), tmp_path)
    base, tuned = random_models()
    merged = twin_bench.merge(recipe.merge.method, base, tuned, **recipe.merge.options)
    for name, found in merged.items():
        expected = published(base[name], [expert[name] for expert in tuned.values()], [0.4] * 3, **formula)
        torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-6)


def test_linear_is_the_mean_of_all_that_is_listed(tmp_path: Path) -> None:
    raw = configuration("linear")
    del raw["base_model"]
    recipe, note = read(raw, tmp_path)
    assert (recipe.base_model, list(recipe.experts), note) == ("org/expert-0", ["expert-0", "expert-1", "expert-2"], "")
    base, tuned = random_models()
    merged = twin_bench.merge(recipe.merge.method, tuned["expert-0"], tuned, **recipe.merge.options)
    for name in base:
        expected = sum(0.4 * expert[name].double() for expert in tuned.values()) / (3 * 0.4)
        torch.testing.assert_close(merged[name].double(), expected, rtol=1e-5, atol=1e-6)
    with_base = configuration("linear")
    with_base["models"].append({"model": "org/base", "parameters": {"weight": 0.4}})
    assert list(read(with_base, tmp_path)[0].experts)[-1] == "base"


def test_a_file_as_mergekits_readme_has_them(
    causal_families: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    family = causal_families("llama")
    models = [{"model": family.recipe["base_model"]}]
    models += [{"model": path, "parameters": {"weight": 0.25}} for path in family.recipe["experts"].values()]
    raw = {
        "merge_method": "task_arithmetic",
        "base_model": family.recipe["base_model"],
        "models": models,
        "parameters": {"normalize": False},
        "tokenizer_source": "base",
        "dtype": "float32",
    }
    (tmp_path / "mergekit.yaml").write_text(yaml.safe_dump(raw, sort_keys=False))
    assert main(["merge", str(tmp_path / "mergekit.yaml"), str(tmp_path / "out")]) == 0
    assert "note:" not in capsys.readouterr().err
    base, *experts = (load_file(Path(model["model"]) / "model.safetensors") for model in models)
    for name, found in load_file(tmp_path / "out" / "model.safetensors").items():
        expected = base[name].double() + sum(0.25 * (expert[name].double() - base[name]) for expert in experts)
        torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-6)


def test_another_arithmetic_is_said(causal_families: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    family = causal_families("llama")
    models = [{"model": p, "parameters": {"weight": 1, "density": 0.5}} for p in family.recipe["experts"].values()]
    raw = configuration("ties", base_model=family.recipe["base_model"], models=models, dtype="bfloat16")
    (tmp_path / "mergekit.yaml").write_text(yaml.safe_dump(raw))
    assert main(["merge", str(tmp_path / "mergekit.yaml"), str(tmp_path / "out")]) == 0
    notes = [line for line in capsys.readouterr().err.splitlines() if line.startswith("note: ")]
    assert len(notes) == 1
    assert "trims over the whole model" in notes[0]
    assert "sums in float32, while mergekit takes them in bfloat16" in notes[0]


def test_parameters_of_a_model_come_before_the_files(tmp_path: Path) -> None:
    raw = configuration("dare_linear", parameters={"density": 0.9, "weight": 3.0, "lambda": 0.5}, out_dtype="float16")
    for model in raw["models"]:
        model["parameters"]["density"] = 0.3
    recipe, _ = read(raw, tmp_path)
    assert recipe.merge.method == "dare_task_arithmetic"
    assert recipe.merge.options == pytest.approx({"density": 0.3, "scaling": 0.2})
    assert recipe.dtype == "float16"


def test_experts_of_one_name_are_told_apart(tmp_path: Path) -> None:
    raw = configuration("linear")
    for model, path in zip(raw["models"], ("a/Model-1.5", "b/Model-1.5", "c/Model"), strict=True):
        model["model"] = path
    assert read(raw, tmp_path)[0].experts == {
        "Model-1-5": "a/Model-1.5",
        "Model-1-5_1": "b/Model-1.5",
        "Model": "c/Model",
    }


def unit(tensor: Tensor) -> Tensor:
    return tensor / tensor.norm()


def slerped(one: Tensor, other: Tensor, t: float) -> Tensor:
    angle = (unit(one) * unit(other)).sum().clamp(-1, 1).acos()
    return (((1 - t) * angle).sin() * one + (t * angle).sin() * other) / angle.sin()


@pytest.mark.parametrize("named", [True, False])
def test_nuslerps_weights_are_a_point_of_the_arc(tmp_path: Path, named: bool) -> None:
    """Between task vectors where a base model is named, between weights where none is."""
    raw = configuration("nuslerp", count=2)
    raw["models"][1]["parameters"]["weight"] = 1.2
    if named:
        raw["models"].insert(0, {"model": "org/base"})
    else:
        del raw["base_model"]
    recipe, note = read(raw, tmp_path)
    assert (list(recipe.experts), note) == (["expert-0", "expert-1"], "")
    base, tuned = random_models(2)
    tuned["expert-1"] = {name: 2 * tensor + 1 for name, tensor in tuned["expert-1"].items()}
    merged = twin_bench.merge(recipe.merge.method, base, tuned, **recipe.merge.options)
    for name, found in merged.items():
        origin = base[name].double() if named else torch.zeros(())
        one, other = (expert[name].double() - origin for expert in tuned.values())
        torch.testing.assert_close(found.double(), origin + slerped(one, other, 0.75), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("named", [True, False])
def test_multislerp_is_the_mean_direction_at_the_mean_length(tmp_path: Path, named: bool) -> None:
    raw = configuration("multislerp", **({} if named else {"base_model": None}))
    recipe, note = read(raw, tmp_path)
    assert note == ""
    base, tuned = random_models()
    merged = twin_bench.merge(recipe.merge.method, base, tuned, **recipe.merge.options)
    for name, found in merged.items():
        origin = base[name].double() if named else torch.zeros(())
        taus = torch.stack([expert[name].double() - origin for expert in tuned.values()])
        length = torch.stack([tau.norm() for tau in taus]).mean()
        expected = origin + length * unit(torch.stack([unit(tau) for tau in taus]).mean(dim=0))
        torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-5)


def test_karcher_takes_all_that_is_listed(tmp_path: Path) -> None:
    """Of two models it is the middle of the arc, at the mean length."""
    models = [{"model": f"org/expert-{index}"} for index in range(2)]
    raw = configuration("karcher", base_model=None, models=models, parameters={"max_iter": 20, "tol": 1e-9})
    recipe, note = read(raw, tmp_path)
    assert (list(recipe.experts), note) == (["expert-0", "expert-1"], "")
    assert recipe.merge.options == {"max_iter": 20, "tol": 1e-9}
    base, tuned = random_models(2)
    merged = twin_bench.merge(recipe.merge.method, base, tuned, **recipe.merge.options)
    for name, found in merged.items():
        one, other = (expert[name].double() for expert in tuned.values())
        expected = (one.norm() + other.norm()) / 2 * slerped(unit(one), unit(other), 0.5)
        torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("method", "parameters", "options"),
    [
        ("sce", {}, {"select_topk": 1.0}),
        ("sce", {"select_topk": 0.2}, {"select_topk": 0.2}),
        ("ram", {}, {"epsilon": 1e-5}),
        ("ram", {"epsilon": 0.01}, {"epsilon": 0.01}),
    ],
)
def test_methods_without_weights(
    tmp_path: Path, method: str, parameters: dict[str, Any], options: dict[str, float]
) -> None:
    models = [{"model": "org/base"}, {"model": "org/expert-0"}, {"model": "org/expert-1"}]
    recipe, note = read(configuration(method, models=models, parameters=parameters), tmp_path)
    assert (recipe.merge.method, recipe.merge.options, note) == (method, options, "")
    assert list(recipe.experts) == ["expert-0", "expert-1"]


REFUSALS: list[tuple[str, dict[str, Any], str]] = [
    ("task_arithmetic", {"slices": []}, "slices: layers of several models"),
    ("task_arithmetic", {"tokenizer": {"source": "union"}}, "tokenizer: the result has the base model's"),
    ("task_arithmetic", {"tokenizer_source": "union"}, "tokenizer_source: "),
    ("task_arithmetic", {"chat_template": "auto"}, "chat_template: "),
    ("task_arithmetic", {"nonsense": 1}, "nonsense: unknown key"),
    ("task_arithmetic", {"base_model": None}, "base_model: task_arithmetic needs one"),
    ("task_arithmetic", {"models": []}, "models: "),
    ("task_arithmetic", {"models": [{"model": "org/base"}]}, "only the base model is listed"),
    ("task_arithmetic", {"models": [{"model": "org/a"}]}, "weight: missing for org/a"),
    ("task_arithmetic", {"models": [{"model": "org/base+org/lora"}]}, "name the adapter alone"),
    (
        "task_arithmetic",
        {"models": [{"model": "org/a", "parametres": {}}]},
        "parametres: unknown key; did you mean 'param",
    ),
    ("task_arithmetic", {"dtype": "float8"}, "dtype: "),
    ("task_arithmetic", {"parameters": {"density": 0.5}}, "parameters.density: has no counterpart"),
    ("task_arithmetic", {"parameters": {"lambda": "0.5"}}, "parameters.lambda: must be a number, not '0.5'"),
    ("task_arithmetic", {"parameters": {"normalize": 1}}, "parameters.normalize: must be true or false, not 1"),
    ("ties", {"parameters": {"int8_mask": True}}, "parameters.int8_mask: masks are not kept in memory"),
    ("ties", {"parameters": {"density": [0.1, 0.9]}}, "parameters.density: differs between layers"),
    (
        "ties",
        {"parameters": {"density": [{"filter": "mlp", "value": 1}]}},
        "parameters.density: differs between layers",
    ),
    ("ties", {"parameters": {"normalize": False}}, "normalize: without it ties takes the sum"),
    ("dare_ties", {}, "normalize: without it dare_ties takes the sum"),
    ("dare_linear", {"parameters": {"rescale": False}}, "parameters.rescale: "),
    ("linear", {"parameters": {"normalize": False}}, "normalize: the weights don't sum to 1"),
    ("multislerp", {"parameters": {"normalize_weights": False}}, "normalize_weights: the weights don't sum to 1"),
    ("multislerp", {"parameters": {"normalize": True}}, "parameters.normalize: has no counterpart"),
    ("nuslerp", {}, "models: nuslerp takes two beside the base_model, not 3"),
    ("nuslerp", {"parameters": {"nuslerp_flatten": False}}, "nuslerp_flatten: angles are taken over whole tensors"),
    ("karcher", {}, "base_model: karcher takes all models alike"),
    ("sce", {}, "models.0.parameters.weight: has no counterpart"),
    ("ram", {"base_model": None}, "base_model: ram needs one"),
    ("passthrough", {}, "merge_method: 'passthrough' has no counterpart here"),
    ("tiess", {}, "did you mean 'ties'"),
]


@pytest.mark.parametrize(("method", "changes", "message"), REFUSALS)
def test_what_has_no_counterpart_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], method: str, changes: dict[str, Any], message: str
) -> None:
    (tmp_path / "mergekit.yaml").write_text(yaml.safe_dump(configuration(method, **changes)))
    assert main(["merge", str(tmp_path / "mergekit.yaml"), str(tmp_path / "out")]) == 2
    error = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(error) == 1
    assert message in error[0]
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("key", "value"), [("weight", 0.5), ("density", 0.9)])
def test_models_that_differ_are_refused(tmp_path: Path, key: str, value: float) -> None:
    raw = copy.deepcopy(configuration("ties", parameters={"density": 0.5}))
    raw["models"][1]["parameters"][key] = value
    with pytest.raises(InputError, match=rf"{key}: .*{value}.* differ; twin-bench has one for all experts"):
        read(raw, tmp_path)


def test_a_base_model_has_no_parameters(tmp_path: Path) -> None:
    raw = configuration("ties")
    raw["models"].insert(0, {"model": "org/base", "parameters": {"weight": 1}})
    with pytest.raises(InputError, match=r"models\.0\.parameters: the base model's have no effect"):
        read(raw, tmp_path)


def test_slerp_takes_the_base_model_as_one_end(tmp_path: Path) -> None:
    raw = configuration("slerp", parameters={"t": 0.3})
    raw["models"] = [{"model": "org/expert-0"}, {"model": "org/base"}]
    recipe, _ = read(raw, tmp_path)
    assert list(recipe.experts) == ["base", "expert-0"]
    assert recipe.merge.options == {"t": 0.3}
    with pytest.raises(InputError, match=r"parameters\.t: slerp needs it"):
        read({**raw, "parameters": {}}, tmp_path)
    for models in ([{"model": "org/base"}], [{"model": "org/a"}, {"model": "org/b"}]):
        with pytest.raises(InputError, match="slerp takes two, one of them the base_model"):
            read({**raw, "models": models}, tmp_path)

"""`twin-bench merge`: what is written loads in transformers and PEFT and is what merging in memory gives."""

from __future__ import annotations

import copy
import hashlib
import json
from importlib.metadata import version
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
import yaml
from safetensors.torch import load_file, save_file
from torch import Tensor

import twin_bench
from tests.support.families import Family
from tests.support.models import tiny_causal, tiny_causal_tokenizer, tiny_classifier, tiny_tokenizer
from twin_bench.cli import main
from twin_bench.merging import export
from twin_bench.merging.export import merge_to_directory
from twin_bench.merging.recipe import MergeRecipe

IDS = torch.randint(4, 26, (3, 9), generator=torch.Generator().manual_seed(0))


def recipe_of(family: Family, method: str = "task_arithmetic", **changes: Any) -> dict[str, Any]:
    models = {"base_model": family.recipe["base_model"], "experts": family.recipe["experts"]}
    return {**models, "merge": {"method": method}, **changes}


def write(recipe: dict[str, Any], folder: Path) -> Path:
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe, sort_keys=False))
    return folder / "recipe.yaml"


def merged_in_memory(base: Any, experts: dict[str, Any], into: Any, method: str, **options: Any) -> Any:
    """Return `into` with the parameters that it shares with the base merged, from the live models."""
    result = copy.deepcopy(into)
    shared = {name for name, _ in result.named_parameters() if name.startswith(base.base_model_prefix)}
    shared = shared if hasattr(base, "classifier") or hasattr(base, "score") else dict(result.named_parameters()).keys()
    tensors = {n: p.detach() for n, p in base.named_parameters() if n in shared}
    tuned = {task: {n: p.detach() for n, p in expert.named_parameters()} for task, expert in experts.items()}
    result.load_state_dict(twin_bench.merge(method, tensors, tuned, **options), strict=False)
    return result


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits


def test_the_device_is_where_parameters_are_merged(
    families: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = write(recipe_of(families("bert"), "average"), tmp_path)
    assert main(["merge", str(file), str(tmp_path / "out"), "--device", "abacus"]) == 2
    assert "error: device 'abacus'" in capsys.readouterr().err
    used, lazily = [], export.merge_lazily
    monkeypatch.setattr(export, "merge_lazily", lambda *a, device, **o: used.append(device) or lazily(*a, **o))
    monkeypatch.setattr("twin_bench.twin.device.usable_device", torch.device)
    assert main(["merge", str(file), str(tmp_path / "out"), "--device", "cuda:1"]) == 0
    assert used == [torch.device("cuda:1")]


@pytest.mark.parametrize("method", ["average", "dare_ties"])
@pytest.mark.parametrize("kind", ["bert", "roberta", "distilbert", "gpt2"])
def test_a_classifier_with_a_head_is_the_merge_in_memory(families: Any, tmp_path: Path, kind: str, method: str) -> None:
    family = families(kind)
    file = write(recipe_of(family, method, head="mnli"), tmp_path)
    assert main(["merge", str(file), str(tmp_path / "out")]) == 0
    loaded, report = transformers.AutoModelForSequenceClassification.from_pretrained(
        tmp_path / "out", output_loading_info=True
    )
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    assert loaded.config.num_labels == 3
    expected = merged_in_memory(family.base, family.experts, family.experts["mnli"], method)
    expected.config.pad_token_id = loaded.config.pad_token_id
    torch.testing.assert_close(logits(loaded), logits(expected), rtol=0, atol=0)


@pytest.mark.parametrize("kind", ["bert", "gpt2"])
def test_a_classifier_without_head_is_a_backbone(families: Any, tmp_path: Path, kind: str) -> None:
    family = families(kind)
    file = write(recipe_of(family, merge={"method": "ties", "density": 0.4}), tmp_path)
    assert main(["merge", str(file), str(tmp_path / "out")]) == 0
    loaded, report = transformers.AutoModel.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    assert loaded.config.architectures == [type(family.base.base_model).__name__]
    expected = merged_in_memory(family.base, family.experts, family.base, "ties", density=0.4).base_model
    with torch.no_grad():
        found, reference = (model.eval()(input_ids=IDS).last_hidden_state for model in (loaded, expected))
    assert torch.equal(found, reference)
    assert "new, untrained head" in " ".join((tmp_path / "out" / "README.md").read_text().split())


@pytest.mark.parametrize("kind", ["flan-t5", "bart"])
def test_an_encoder_decoder_is_the_merge_in_memory(seq2seq_families: Any, tmp_path: Path, kind: str) -> None:
    family = seq2seq_families(kind)
    file = write(recipe_of(family, merge={"method": "ties", "density": 0.4}), tmp_path)
    assert main(["merge", str(file), str(tmp_path / "out")]) == 0
    loaded, report = transformers.AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    expected = merged_in_memory(family.base, family.experts, family.base, "ties", density=0.4)
    with torch.no_grad():
        found, reference = (model.eval()(input_ids=IDS, labels=IDS).logits for model in (loaded, expected))
    assert torch.equal(found, reference)
    output = loaded.get_output_embeddings().weight
    assert (output is loaded.get_input_embeddings().weight) == (kind == "bart")


@pytest.mark.parametrize("kind", ["llama", "qwen2", "gpt2"])
def test_a_language_model_is_the_merge_in_memory(causal_families: Any, tmp_path: Path, kind: str) -> None:
    family = causal_families(kind)
    file = write(recipe_of(family, "dare_task_arithmetic", seed=3), tmp_path)
    assert main(["merge", str(file), str(tmp_path / "out")]) == 0
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    expected = merged_in_memory(family.base, family.experts, family.base, "dare_task_arithmetic", seed=3)
    assert torch.equal(logits(loaded), logits(expected))
    other = merged_in_memory(family.base, family.experts, family.base, "dare_task_arithmetic", seed=4)
    assert not torch.equal(logits(loaded), logits(other))
    text = "the cat sat on a red dog"
    found, reference = (
        transformers.AutoTokenizer.from_pretrained(folder)(text)["input_ids"]
        for folder in (tmp_path / "out", family.root / "base")
    )
    assert found == reference


def test_shards_hold_what_one_file_holds(causal_families: Any, tmp_path: Path) -> None:
    recipe = MergeRecipe.model_validate(recipe_of(causal_families("qwen2"), "ties"))
    merge_to_directory(recipe, tmp_path / "whole")
    merge_to_directory(recipe, tmp_path / "shards", shard_bytes=20_000)
    whole = load_file(tmp_path / "whole" / "model.safetensors")
    files = sorted((tmp_path / "shards").glob("*.safetensors"))
    assert len(files) > 3
    shards = [load_file(file) for file in files]
    sizes = [sum(tensor.nbytes for tensor in shard.values()) for shard in shards]
    assert all(size <= 20_000 or len(shard) == 1 for size, shard in zip(sizes, shards, strict=True))
    together = {name: tensor for shard in shards for name, tensor in shard.items()}
    assert together.keys() == whole.keys()
    assert all(torch.equal(tensor, whole[name]) for name, tensor in together.items())
    found = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "shards")
    assert torch.equal(logits(found), logits(transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "whole")))


def in_bfloat16(family: Family, root: Path) -> dict[str, Any]:
    for name in ("base", *family.experts):
        model = family.base if name == "base" else family.experts[name]
        copy.deepcopy(model).to(torch.bfloat16).save_pretrained(root / name)
    tiny_causal_tokenizer().save_pretrained(root / "base")
    return recipe_of(family, base_model=str(root / "base"), experts={t: str(root / t) for t in family.experts})


def test_dtypes(causal_families: Any, tmp_path: Path) -> None:
    """A wider dtype than the inputs' loses nothing, a narrower one rounds once, at the end."""
    family = causal_families("llama")
    narrow = in_bfloat16(family, tmp_path)
    cases = {
        "kept": (narrow, torch.bfloat16),
        "widened": (narrow | {"dtype": "float32"}, torch.float32),
        "narrowed": (recipe_of(family, dtype="bfloat16"), torch.bfloat16),
    }
    for name, (recipe, dtype) in cases.items():
        merge_to_directory(MergeRecipe.model_validate(recipe), tmp_path / name)
        base, *experts = (
            load_file(f"{folder}/model.safetensors") for folder in (recipe["base_model"], *recipe["experts"].values())
        )
        for tensor, found in load_file(tmp_path / name / "model.safetensors").items():
            exact = base[tensor].float() + 0.3 * sum(
                expert[tensor].float() - base[tensor].float() for expert in experts
            )
            torch.testing.assert_close(found, exact.to(dtype), rtol=1e-6 if dtype is torch.float32 else 8e-3, atol=1e-6)
        assert transformers.AutoConfig.from_pretrained(tmp_path / name).dtype is dtype
    rounded_twice = load_file(tmp_path / "kept" / "model.safetensors")
    widened = load_file(tmp_path / "widened" / "model.safetensors")
    assert any(not torch.equal(widened[name], tensor.float()) for name, tensor in rounded_twice.items())


CLASSIFIER_ADAPTERS: dict[str, tuple[str, dict[str, Any]]] = {
    "linear": ("bert", {"target_modules": ["query", "value", "dense"], "r": 4, "lora_alpha": 6}),
    "embedding": ("roberta", {"target_modules": ["word_embeddings", "query"], "r": 3, "lora_alpha": 6}),
    "patterns": (
        "bert",
        {"target_modules": ["query", "key"], "r": 4, "rank_pattern": {"layer.1.attention.self.query": 2}},
    ),
    "two modules a head": ("distilbert", {"target_modules": ["q_lin", "lin1"], "r": 2}),
    "conv1d": ("gpt2", {"target_modules": ["c_attn", "c_proj"], "r": 3, "lora_alpha": 7, "use_rslora": True}),
}


def save_adapters(
    root: Path, base: Any, settings: dict[str, Any], targets: dict[str, Any] | None = None
) -> dict[str, str]:
    """Save three LoRA experts on `base`, with ranks of their own; return where."""
    base.save_pretrained(root / "base")
    tokenizer = tiny_tokenizer() if hasattr(base, "classifier") or hasattr(base, "score") else tiny_causal_tokenizer()
    tokenizer.save_pretrained(root / "base")
    paths = {}
    for seed, task in enumerate(("a", "b", "c"), 1):
        torch.manual_seed(seed)
        changed = {**settings, "r": settings["r"] + seed, **((targets or {}).get(task, {}))}
        adapted = peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(**changed))
        with torch.no_grad():
            for parameter in adapted.parameters():
                parameter += parameter.requires_grad * 0.3 * torch.randn_like(parameter)
        adapted.save_pretrained(root / task)
        paths[task] = str(root / task)
    return paths


@pytest.mark.parametrize("method", ["average", "task_arithmetic"])
@pytest.mark.parametrize("case", list(CLASSIFIER_ADAPTERS))
def test_lora_classifiers_merge_to_one_adapter(tmp_path: Path, case: str, method: str) -> None:
    kind, settings = CLASSIFIER_ADAPTERS[case]
    paths = save_adapters(tmp_path, tiny_classifier(kind), {"task_type": "SEQ_CLS", **settings})
    recipe = {"base_model": str(tmp_path / "base"), "experts": paths, "merge": {"method": method}, "head": "b"}
    for name, as_adapter in (("dense", False), ("adapter", True)):
        assert main(["merge", str(write({**recipe, "as_adapter": as_adapter}, tmp_path)), str(tmp_path / name)]) == 0
    dense = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "dense")
    base = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "base")
    untouched = logits(base)
    base.config.pad_token_id = dense.config.pad_token_id
    adapted = peft.PeftModel.from_pretrained(base, tmp_path / "adapter")
    torch.testing.assert_close(logits(adapted), logits(dense), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(logits(adapted), untouched, atol=1e-2)
    head_modules = {name.split(".")[0] for name, _ in dense.named_parameters()} - {dense.base_model_prefix}
    settings = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert set(settings["modules_to_save"]) == head_modules


def test_an_adapter_without_head_is_on_the_backbone(tmp_path: Path) -> None:
    settings = {"task_type": "SEQ_CLS", "target_modules": ["query"], "r": 2}
    paths = save_adapters(tmp_path, tiny_classifier("bert"), settings)
    recipe = {"base_model": str(tmp_path / "base"), "experts": paths, "merge": {"method": "average"}}
    for name, as_adapter in (("dense", False), ("adapter", True)):
        merge_to_directory(MergeRecipe.model_validate({**recipe, "as_adapter": as_adapter}), tmp_path / name)
    adapted = peft.PeftModel.from_pretrained(
        transformers.AutoModel.from_pretrained(tmp_path / "base"), tmp_path / "adapter"
    )
    dense = transformers.AutoModel.from_pretrained(tmp_path / "dense")
    with torch.no_grad():
        found, reference = (model.eval()(input_ids=IDS).last_hidden_state for model in (adapted, dense))
    torch.testing.assert_close(found, reference, rtol=1e-4, atol=1e-5)


def test_language_adapters_on_different_modules_merge_to_one(tmp_path: Path) -> None:
    """Experts that adapt different matrices: each counts where it is, and average still divides by T."""
    settings = {"task_type": "CAUSAL_LM", "target_modules": ["q_proj", "down_proj"], "r": 2}
    targets = {"b": {"target_modules": ["q_proj", "up_proj"]}}
    base = tiny_causal("qwen2")
    paths = save_adapters(tmp_path, base, settings, targets)
    recipe = {
        "base_model": str(tmp_path / "base"),
        "experts": paths,
        "merge": {"method": "average"},
        "as_adapter": True,
    }
    merge_to_directory(MergeRecipe.model_validate(recipe), tmp_path / "adapter")
    adapted = peft.PeftModel.from_pretrained(
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base"), tmp_path / "adapter"
    )
    mean = copy.deepcopy(base)
    tuned = [
        dict(peft.PeftModel.from_pretrained(copy.deepcopy(base), path).merge_and_unload().named_parameters())
        for path in paths.values()
    ]
    mean.load_state_dict(
        {name: torch.stack([t[name].detach() for t in tuned]).mean(dim=0) for name in tuned[0]}, strict=False
    )
    torch.testing.assert_close(logits(adapted), logits(mean), rtol=1e-4, atol=1e-5)


def test_what_no_single_adapter_can_express(tmp_path: Path, families: Any, capsys: pytest.CaptureFixture[str]) -> None:
    plain = {"task_type": "SEQ_CLS", "target_modules": ["query"], "r": 2}
    experts = save_adapters(tmp_path, tiny_classifier("bert"), plain, {"c": {"bias": "all"}})
    lora = {"base_model": str(tmp_path / "base"), "experts": experts, "as_adapter": True}
    (tmp_path / "causal").mkdir()
    on_embeddings = {"task_type": "CAUSAL_LM", "target_modules": ["embed_tokens"], "r": 2}
    tied = save_adapters(tmp_path / "causal", tiny_causal("llama"), on_embeddings)
    cases = {
        "as_adapter: ties does not sum task vectors": {**lora, "merge": {"method": "ties"}},
        "as_adapter: expert 'c' replaces": {**lora, "merge": {"method": "average"}},
        "as_adapter: expert 'cola' is not a LoRA adapter": recipe_of(families("bert"), as_adapter=True),
        "is tied to lm_head.weight": {
            **lora,
            "base_model": str(tmp_path / "causal" / "base"),
            "experts": tied,
            "merge": {"method": "average"},
        },
    }
    for message, recipe in cases.items():
        assert main(["merge", str(write(recipe, tmp_path)), str(tmp_path / "out")]) == 2
        assert message in capsys.readouterr().err
        assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"merge": {"method": "tis"}}, "unknown merge method 'tis'; did you mean 'ties'"),
        ({"merge": {"method": "ties", "densty": 1}}, "ties has no option 'densty'; did you mean 'density'"),
        ({"merge": {"method": "twin"}}, "not a static merge method"),
        ({"merge": None}, "merge: "),
        ({"head": "rte"}, "head: no expert 'rte'"),
        ({"shared": {"method": "ties"}}, "shared: unknown key"),
        ({"dtype": "int8"}, "dtype"),
        ({"experts": {}}, "experts"),
        ({"base_model": "/nowhere"}, "'/nowhere'"),
    ],
)
def test_bad_merge_recipes(
    families: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], change: dict[str, Any], message: str
) -> None:
    file = write({**recipe_of(families("bert")), **change}, tmp_path)
    assert main(["merge", str(file), str(tmp_path / "out")]) == 2
    error = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(error) == 1
    assert message in error[0]
    assert [path.name for path in tmp_path.iterdir()] == ["recipe.yaml"]


def test_a_merge_that_fails_half_way_leaves_nothing(
    causal_families: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    family = causal_families("llama")
    broken = tmp_path / "broken"
    family.experts["bbq"].save_pretrained(broken)
    tensors = load_file(broken / "model.safetensors")
    save_file({**tensors, "model.norm.weight": tensors["model.norm.weight"] * torch.nan}, broken / "model.safetensors")
    recipe = recipe_of(family, experts={**family.recipe["experts"], "bbq": str(broken)})
    assert main(["merge", str(write(recipe, tmp_path)), str(tmp_path / "out")]) == 2
    assert "model.norm.weight holds NaN or inf" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["broken", "recipe.yaml"]
    (tmp_path / "out").mkdir()
    assert main(["merge", str(write(recipe_of(family), tmp_path)), str(tmp_path / "out")]) == 2
    assert "exists already" in capsys.readouterr().err
    assert main(["merge", str(write(recipe_of(family, head="bbq"), tmp_path)), str(tmp_path / "new")]) == 2
    assert "a language model has no separate head" in capsys.readouterr().err
    assert (
        main(
            [
                "merge",
                str(
                    write(
                        recipe_of(family, dtype="float16", merge={"method": "task_arithmetic", "scaling": 1e7}),
                        tmp_path,
                    )
                ),
                str(tmp_path / "new"),
            ]
        )
        == 2
    )
    assert "overflows float16; set dtype" in capsys.readouterr().err


def test_the_card_says_what_went_in(families: Any, tmp_path: Path) -> None:
    family = families("bert")
    merge = {"method": "dare_ties", "density": 0.55}
    count = merge_to_directory(
        MergeRecipe.model_validate(recipe_of(family, merge=merge, seed=8, head="stsb")), tmp_path / "out"
    )
    assert count == sum(p.numel() for p in family.experts["stsb"].parameters())
    card = (tmp_path / "out" / "README.md").read_text()
    front = yaml.safe_load(card.split("---\n")[1])
    assert front == {"library_name": "transformers", "tags": ["merge", "twin-bench"]}
    for said in (
        "- density: 0.55\n",
        "- seed: 8\n",
        "arxiv.org/abs/2311.03099",
        f"twin-bench {version('twin-bench')}",
        f"parameters: {count:,}",
        "expert `stsb`",
    ):
        assert said in card
    for name in ("base", "cola", "stsb", "mnli"):
        lines = [
            f"{file.name}:{hashlib.sha256(file.read_bytes()).hexdigest()}"
            for file in sorted((family.root / name).iterdir())
            if file.suffix in (".safetensors", ".json")
        ]
        assert f"| {name} | {hashlib.sha256(json.dumps(lines).encode()).hexdigest()} |" in card
    assert str(family.root.parent) not in card

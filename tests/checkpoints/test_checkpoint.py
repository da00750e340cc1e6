"""Checkpoints: full, sharded, bare backbones, PEFT adapters; each error names its tensor or file."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from tests.support.models import tiny_classifier, tiny_tokenizer
from twin_bench import InputError, TwinModel
from twin_bench.checkpoints.adapter import open_expert
from twin_bench.checkpoints.checkpoint import Checkpoint, open_checkpoint
from twin_bench.checkpoints.skeleton import Skeleton, read_config, skeleton_of
from twin_bench.checkpoints.sources import open_sources
from twin_bench.twin.builder import build_twin
from twin_bench.twin.recipe import Recipe

pytestmark = pytest.mark.versions


def opened(directory: Path, kind: str) -> tuple[Checkpoint, Skeleton]:
    skeleton = skeleton_of(read_config(directory), "sequence_classification")
    return open_checkpoint(directory, skeleton), skeleton


def assert_holds(checkpoint: Checkpoint, model: Any) -> None:
    parameters = {n: p for n, p in model.named_parameters() if n in checkpoint}
    assert parameters.keys() == set(checkpoint)
    for name, parameter in parameters.items():
        torch.testing.assert_close(checkpoint[name].double(), parameter.detach().double(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("kind", ["bert", "roberta", "distilbert", "gpt2"])
def test_full_checkpoints_whole_sharded_and_bare(tmp_path: Path, kind: str) -> None:
    model = tiny_classifier(kind)
    model.save_pretrained(tmp_path / "whole")
    model.save_pretrained(tmp_path / "shards", max_shard_size="10KB")
    model.base_model.save_pretrained(tmp_path / "bare")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 2
    for form in ("whole", "shards", "bare"):
        checkpoint, skeleton = opened(tmp_path / form, kind)
        assert_holds(checkpoint, model)
        heads = {} if form == "bare" else {n: p for n, p in model.named_parameters() if n in skeleton.head}
        assert checkpoint.head().keys() == heads.keys()
        assert all(torch.equal(tensor, heads[name]) for name, tensor in checkpoint.head().items())


ADAPTERS: dict[str, Any] = {
    "plain": {"target_modules": ["query", "value", "dense"], "r": 4, "lora_alpha": 6},
    "rslora": {"target_modules": ["query"], "r": 4, "lora_alpha": 6, "use_rslora": True},
    "patterns": {
        "target_modules": ["query", "key"],
        "r": 4,
        "lora_alpha": 6,
        "rank_pattern": {"layer.1.attention.self.query": 2},
        "alpha_pattern": {"layer.0.attention.self.key": 3},
    },
    "embedding": {"target_modules": ["word_embeddings", "query"], "r": 3, "lora_alpha": 6},
    "saved": {"target_modules": ["value"], "r": 2, "modules_to_save": ["classifier", "LayerNorm"]},
    "biases": {"target_modules": ["value"], "r": 2, "bias": "all"},
}


@pytest.mark.parametrize("name", list(ADAPTERS))
@pytest.mark.parametrize("kind", ["bert", "roberta"])
def test_adapters_are_what_peft_merges(tmp_path: Path, kind: str, name: str) -> None:
    check_adapter(tmp_path, kind, ADAPTERS[name])


def test_conv1d_adapters_are_what_peft_merges(tmp_path: Path) -> None:
    check_adapter(tmp_path, "gpt2", {"target_modules": ["c_attn", "c_proj", "c_fc"], "r": 3, "lora_alpha": 7})


def check_adapter(tmp_path: Path, kind: str, settings: dict[str, Any]) -> None:
    base = tiny_classifier(kind)
    base.save_pretrained(tmp_path / "base")
    adapted = peft.get_peft_model(
        tiny_classifier(kind, like=base, noise=0.0), peft.LoraConfig(task_type="SEQ_CLS", **settings)
    )
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter += 0.3 * torch.randn_like(parameter)
    adapted.save_pretrained(tmp_path / "adapter")
    merged = adapted.merge_and_unload()
    checkpoint, skeleton = opened(tmp_path / "base", kind)
    expert = open_expert(tmp_path / "adapter", checkpoint, skeleton)
    assert_holds(expert, merged)
    heads = {name: p for name, p in merged.named_parameters() if name in skeleton.head}
    assert expert.head().keys() == heads.keys()
    assert all(torch.equal(tensor, heads[name]) for name, tensor in expert.head().items())
    changed = [name for name in expert if not torch.equal(expert[name], checkpoint[name])]
    assert changed
    assert len(changed) < len(expert) or settings.get("bias") == "all"


def test_published_layout_of_roberta_experts(tmp_path: Path) -> None:
    """{task}/roberta-base_lr1e-05/ beside a base saved with its masked-LM head, as on the hub."""
    base = tiny_classifier("roberta")
    masked = transformers.RobertaForMaskedLM(base.config)
    masked.roberta.load_state_dict(base.roberta.state_dict())
    masked.save_pretrained(tmp_path / "roberta-base")
    tiny_tokenizer().save_pretrained(tmp_path / "roberta-base")
    experts = {}
    for seed, (task, labels) in enumerate({"cola": 2, "stsb": 1, "mnli": 3}.items(), 1):
        experts[task] = tiny_classifier("roberta", labels, seed, like=base)
        experts[task].save_pretrained(tmp_path / "roberta-glue" / task / "roberta-base_lr1e-05")
    paths = {task: str(tmp_path / "roberta-glue" / task / "roberta-base_lr1e-05") for task in experts}
    recipe = {"base_model": str(tmp_path / "roberta-base"), "experts": paths, "exclusive": {"density": 1.0}}
    build_twin(Recipe.model_validate(recipe), tmp_path / "twin")
    twin = TwinModel.from_pretrained(tmp_path / "twin")
    assert twin.num_labels == {"cola": 2, "stsb": 1, "mnli": 3}
    ids = torch.randint(4, 26, (3, 8), generator=torch.Generator().manual_seed(0))
    for index, (task, expert) in enumerate(experts.items()):
        with torch.no_grad():
            expected = expert(input_ids=ids).logits
        found = twin(ids, fusion_weights=torch.eye(3)[index].repeat(3, 1), task=task).logits
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_bad_checkpoints(tmp_path: Path) -> None:
    base = tiny_classifier("bert")
    base.save_pretrained(tmp_path / "base")
    checkpoint, skeleton = opened(tmp_path / "base", "bert")
    weights = load_file(tmp_path / "base" / "model.safetensors")
    word = "bert.embeddings.word_embeddings.weight"
    cases = {
        "short": (
            {**weights, word: weights[word][:-1].clone()},
            rf"short: tensor {word} is \(27, 24\).*\(28, 24\).*vocab",
        ),
        "nan": ({**weights, word: weights[word] * torch.nan}, rf"nan: tensor {word} holds NaN or inf"),
        "lacking": ({n: t for n, t in weights.items() if n != word}, rf"lacking: tensor {word} is missing"),
    }
    for name, (tensors, message) in cases.items():
        shutil.copytree(tmp_path / "base", tmp_path / name)
        save_file(tensors, tmp_path / name / "model.safetensors")
        if name == "nan":  # all else is found before anything is computed
            expert = open_expert(tmp_path / name, checkpoint, skeleton)
            with pytest.raises(InputError, match=message):
                dict(expert.items())
        else:
            with pytest.raises(InputError, match=message):
                open_expert(tmp_path / name, checkpoint, skeleton)
    shutil.copytree(tmp_path / "base", tmp_path / "cut")
    (tmp_path / "cut" / "model.safetensors").write_bytes(b"\x00" * 40)
    with pytest.raises(InputError, match=r"cut/model\.safetensors: not a readable safetensors file"):
        open_expert(tmp_path / "cut", checkpoint, skeleton)
    with pytest.raises(InputError, match=r"no model\.safetensors there"):
        open_expert(tmp_path, checkpoint, skeleton)


def test_pickles_are_refused_unless_asked_for(tmp_path: Path) -> None:
    base = tiny_classifier("bert")
    base.save_pretrained(tmp_path / "pickled")
    (tmp_path / "pickled" / "model.safetensors").unlink()
    torch.save(base.state_dict(), tmp_path / "pickled" / "pytorch_model.bin")
    skeleton = skeleton_of(base.config, "sequence_classification")
    with pytest.raises(InputError, match=r"pytorch_model\.bin: a pickle can run code.*save_pretrained"):
        open_checkpoint(tmp_path / "pickled", skeleton)
    assert_holds(open_checkpoint(tmp_path / "pickled", skeleton, allow_pickle=True), base)


def test_pickles_of_every_form_are_read_when_asked_for(tmp_path: Path) -> None:
    """Before 1.6 torch wrote no zip archive, which can't be mapped into memory; large models come in shards."""
    base = tiny_classifier("bert")
    skeleton = skeleton_of(base.config, "sequence_classification")
    state = base.state_dict()
    for form in ("old", "shards", "more", "list", "damaged"):
        base.config.save_pretrained(tmp_path / form)
    torch.save(state, tmp_path / "old" / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    names = list(state)
    for number, own in enumerate((names[:9], names[9:])):
        torch.save({name: state[name] for name in own}, tmp_path / "shards" / f"pytorch_model-{number}.bin")
    index = {"weight_map": {name: f"pytorch_model-{int(i >= 9)}.bin" for i, name in enumerate(names)}}
    (tmp_path / "shards" / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    for form in ("old", "shards"):
        checkpoint = open_checkpoint(tmp_path / form, skeleton, allow_pickle=True)
        assert_holds(checkpoint, base)
        assert all(torch.equal(tensor, state[name]) for name, tensor in checkpoint.head().items())
        with pytest.raises(InputError, match="a pickle can run code"):
            open_checkpoint(tmp_path / form, skeleton)
    torch.save({"state": state, "epoch": 3}, tmp_path / "more" / "pytorch_model.bin")
    torch.save([Path("x")], tmp_path / "list" / "pytorch_model.bin")
    (tmp_path / "damaged" / "pytorch_model.bin").write_bytes(b"\x80\x02damaged")
    for form, message in (
        ("more", r"more/pytorch_model\.bin: state is a (Ordered)?[dD]ict; save the model's state dict alone"),
        ("list", r"list/pytorch_model\.bin: can't be read as a pickle of tensors alone"),
        ("damaged", r"damaged/pytorch_model\.bin: can't be read as a pickle of tensors alone"),
    ):
        with pytest.raises(InputError, match=message) as caught:
            open_checkpoint(tmp_path / form, skeleton, allow_pickle=True)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", ["bert", "gpt2"])
def test_a_base_without_tokenizer_is_refused(tmp_path: Path, families: Any, kind: str) -> None:
    """transformers 5 makes a tokenizer of special tokens alone, under which every word is unknown."""
    family = families(kind)
    shutil.copytree(family.root / "base", tmp_path / "base")
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "base" / file).unlink()
    with pytest.raises(
        InputError, match=r"base: (no tokenizer there|its tokenizer can't).*expected tokenizer\.json or"
    ):
        open_sources(str(tmp_path / "base"), family.recipe["experts"])
    (tmp_path / "base" / "tokenizer.json").write_text("{")
    with pytest.raises(InputError, match="base: its tokenizer can't be read"):
        open_sources(str(tmp_path / "base"), family.recipe["experts"])


def test_a_base_with_a_vocabulary_in_its_own_files_is_read(tmp_path: Path, families: Any) -> None:
    family = families("bert")
    shutil.copytree(family.root / "base", tmp_path / "base")
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "base" / file).unlink()
    (tmp_path / "base" / "vocab.txt").write_text("[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\ncat\n")
    sources = open_sources(str(tmp_path / "base"), family.recipe["experts"])
    assert sources.tokenizer("cat")["input_ids"] == [2, 5, 3]


def test_a_shard_outside_its_folder_is_refused(tmp_path: Path) -> None:
    base = tiny_classifier("bert")
    base.save_pretrained(tmp_path / "base", max_shard_size="10KB")
    index = tmp_path / "base" / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"][next(iter(content["weight_map"]))] = "../elsewhere.safetensors"
    index.write_text(json.dumps(content))
    with pytest.raises(InputError, match="leaves the directory"):
        open_checkpoint(tmp_path / "base", skeleton_of(base.config, "sequence_classification"))


def test_adapters_that_are_no_lora_delta_are_refused(tmp_path: Path) -> None:
    base = tiny_classifier("bert")
    base.save_pretrained(tmp_path / "base")
    checkpoint, skeleton = opened(tmp_path / "base", "bert")
    dora = peft.LoraConfig(task_type="SEQ_CLS", target_modules=["query"], use_dora=True)
    peft.get_peft_model(base, dora).save_pretrained(tmp_path / "dora")
    with pytest.raises(InputError, match=r"use_dora adapter is not a plain LoRA delta.*merge_and_unload"):
        open_expert(tmp_path / "dora", checkpoint, skeleton)
    wider = transformers.BertConfig(hidden_size=48, num_attention_heads=2, num_hidden_layers=2, intermediate_size=40)
    other = transformers.AutoModelForSequenceClassification.from_config(wider)
    lora = peft.LoraConfig(task_type="SEQ_CLS", target_modules=["query"])
    peft.get_peft_model(other, lora).save_pretrained(tmp_path / "wide")
    with pytest.raises(InputError, match=r"query\.weight is \(48, 48\), the base model's is \(24, 24\)"):
        dict(open_expert(tmp_path / "wide", checkpoint, skeleton).items())


def test_experts_of_other_kinds_are_refused(tmp_path: Path, families: Any) -> None:
    family = families("bert")
    causal = transformers.GPT2LMHeadModel(transformers.GPT2Config(n_embd=8, n_layer=1, n_head=1, vocab_size=9))
    causal.save_pretrained(tmp_path / "causal")
    with pytest.raises(InputError, match=r"'x': model_type is gpt2, the base model's is bert"):
        open_sources(family.recipe["base_model"], {"x": str(tmp_path / "causal")})
    both = {"cola": family.recipe["experts"]["cola"], "x": str(tmp_path / "causal")}
    with pytest.raises(InputError, match="'x' is a causal_lm model and 'cola' a sequence_classification one"):
        open_sources(family.recipe["base_model"], both)
    family.base.base_model.save_pretrained(tmp_path / "headless")
    with pytest.raises(InputError, match=r"'x': .*BertModel; twins are made of"):
        open_sources(family.recipe["base_model"], {"x": str(tmp_path / "headless")})
    with pytest.raises(InputError, match="letters, digits"):
        open_sources(family.recipe["base_model"], {"../x": str(tmp_path / "causal")})


def saved_adapter(base: Any, directory: Path, **settings: Any) -> tuple[Checkpoint, Skeleton]:
    """Save a LoRA adapter of rank 4 on `base`, and `base` beside it; return `base` opened."""
    base.save_pretrained(directory.parent / "base")
    config = peft.LoraConfig(**{"task_type": "SEQ_CLS", "target_modules": ["query", "key"], "r": 4, **settings})
    peft.get_peft_model(tiny_classifier("bert", like=base, noise=0.0), config).save_pretrained(directory)
    return opened(directory.parent / "base", "bert")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"r": 64}, r"key\.weight has factors A \(4, 24\) and B \(24, 4\), and its rank in .* is 64"),
        ({"r": 0}, "its rank in adapter_config.json is 0"),
        ({"rank_pattern": {"layer.1.attention.self.key": 2}}, r"layer\.1\.attention\.self\.key\.weight has .* is 2"),
        ({"lora_alpha": None}, r"adapter_config\.json: lora_alpha is None; expected a number"),
        ({"lora_alpha": float("nan")}, r"adapter_config\.json: lora_alpha is nan; expected a number"),
        ({"lora_alpha": "16"}, r"adapter_config\.json: lora_alpha is '16'; expected a number"),
        ({"alpha_pattern": {"query": None}}, r"adapter_config\.json: alpha_pattern\['query'\] is None"),
        ({"alpha_pattern": {"(": 3}}, r"adapter_config\.json: alpha_pattern: .*expected module names"),
        ({"alpha_pattern": 3}, r"adapter_config\.json: alpha_pattern: .*expected module names"),
        ({"peft_type": "NEWEST"}, r"adapter_config\.json: peft can't read it, peft_type 'NEWEST'"),
        ({"peft_type": None}, r"adapter.*peft_type None|a None adapter is not a plain LoRA delta"),
        ({"peft_type": "ADALORA", "total_step": 9}, "a ADALORA adapter is not a plain LoRA delta"),
        ({"alora_invocation_tokens": [1]}, "a alora_invocation_tokens adapter is not a plain LoRA delta"),
    ],
)
def test_adapters_whose_config_and_tensors_disagree_are_refused(
    tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    checkpoint, skeleton = saved_adapter(tiny_classifier("bert"), tmp_path / "adapter")
    file = tmp_path / "adapter" / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **change}))
    with pytest.raises(InputError, match=message) as caught:
        open_expert(tmp_path / "adapter", checkpoint, skeleton)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("start", ["pissa", "olora"])
def test_adapters_that_change_the_base_when_they_are_loaded_are_refused(tmp_path: Path, start: str) -> None:
    """PEFT subtracts the starting factors from W; W + B A of the base itself is another model."""
    checkpoint, skeleton = saved_adapter(tiny_classifier("bert"), tmp_path / "adapter", init_lora_weights=start)
    with pytest.raises(InputError, match=f"a init_lora_weights: {start} adapter is not a plain LoRA delta"):
        open_expert(tmp_path / "adapter", checkpoint, skeleton)


@pytest.mark.parametrize("start", ["gaussian", "orthogonal"])
def test_adapters_with_another_start_are_what_peft_merges(tmp_path: Path, start: str) -> None:
    check_adapter(tmp_path, "bert", {"target_modules": ["query"], "r": 4, "init_lora_weights": start})


def test_heads_of_the_wrong_shape_are_refused(tmp_path: Path, families: Any) -> None:
    """The twin was built, and could not be loaded."""
    family = families("bert")
    for name, change, message in (
        ("bias", {"classifier.bias": torch.zeros(3)}, r"classifier\.bias is \(3,\).*head of 2 labels has \(2,\)"),
        ("width", {"classifier.weight": torch.zeros(2, 23)}, r"classifier\.weight is \(2, 23\).*\(2, 24\)"),
        ("flat", {"classifier.weight": torch.zeros(24)}, r"classifier\.weight is \(24,\).*\(labels, width\)"),
    ):
        shutil.copytree(family.root / "cola", tmp_path / name)
        tensors = load_file(tmp_path / name / "model.safetensors")
        save_file({**tensors, **change}, tmp_path / name / "model.safetensors")
        with pytest.raises(InputError, match=rf"expert 'x': .*{message}"):
            open_sources(family.recipe["base_model"], {"x": str(tmp_path / name)})


def test_a_head_that_its_config_does_not_describe_is_refused(tmp_path: Path, families: Any) -> None:
    family = families("bert")
    shutil.copytree(family.root / "mnli", tmp_path / "mnli")
    file = tmp_path / "mnli" / "config.json"
    config = {key: value for key, value in json.loads(file.read_text()).items() if key not in ("id2label", "label2id")}
    file.write_text(json.dumps(config))  # without labels a config has two
    with pytest.raises(InputError, match=r"expert 'x': .*head has 3 labels, its config\.json has 2"):
        open_sources(family.recipe["base_model"], {"x": str(tmp_path / "mnli")})
    with pytest.raises(InputError, match=r"expert 'mnli': .*head has 2 labels, GLUE has 3; correct or rename"):
        open_sources(family.recipe["base_model"], {"mnli": str(family.root / "cola")})


def test_an_adapter_of_another_base_is_said(tmp_path: Path, families: Any, caplog: pytest.LogCaptureFixture) -> None:
    """Equal shapes are all that can be compared: a path names no model, so a difference is a warning."""
    family = families("bert")
    settings = {"target_modules": ["query"], "task_type": "SEQ_CLS", "modules_to_save": ["classifier"]}
    peft.get_peft_model(tiny_classifier("bert"), peft.LoraConfig(**settings)).save_pretrained(tmp_path / "adapter")
    file = tmp_path / "adapter" / "adapter_config.json"
    for said, warns in (("elsewhere/base", False), ("org/another-model", True), (None, False)):
        file.write_text(json.dumps({**json.loads(file.read_text()), "base_model_name_or_path": said}))
        caplog.clear()
        open_sources(family.recipe["base_model"], {"x": str(tmp_path / "adapter")})
        assert ("org/another-model" in caplog.text) == warns


@pytest.mark.parametrize(
    ("role", "file", "change", "message"),
    [
        ("cola", "config.json", {"architectures": -1}, r"cola/config\.json: architectures is -1; expected a list"),
        (
            "base",
            "config.json",
            {"hidden_size": -1},
            r"'bert': its config\.json makes no model|no readable config\.json",
        ),
        ("base", "generation_config.json", None, r"base/generation_config\.json: can't be read as JSON"),
        ("base", "generation_config.json", [], r"base/generation_config\.json: expected a JSON object, found list"),
    ],
)
def test_damaged_configs_are_one_line(
    tmp_path: Path, families: Any, role: str, file: str, change: Any, message: str
) -> None:
    family = families("bert")
    for name in ("base", "cola"):
        shutil.copytree(family.root / name, tmp_path / name)
    damaged = tmp_path / role / file
    earlier = json.loads(damaged.read_text()) if damaged.exists() else {}
    damaged.write_text("" if change is None else json.dumps({**earlier, **change} if change else change))
    with pytest.raises(InputError, match=message) as caught:
        open_sources(str(tmp_path / "base"), {"cola": str(tmp_path / "cola")})
    assert "\n" not in str(caught.value)

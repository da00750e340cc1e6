"""Encoder-decoders' twins against a dense model made for every sample, and against transformers and peft alone."""

from __future__ import annotations

import copy
import functools
import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from tests.support.dense import dense, mixes
from tests.support.families import DENSITY, SCALING, built
from tests.support.models import CAUSAL_VOCABULARY as VOCABULARY
from tests.support.models import tiny_seq2seq_tokenizer
from tests.support.paths import force_path
from twin_bench import InputError, TwinModel
from twin_bench.checkpoints.factors import Factors
from twin_bench.merging.export import merge_to_directory
from twin_bench.merging.recipe import MergeRecipe
from twin_bench.twin.exclusive import Exclusive
from twin_bench.twin.layers import install
from twin_bench.twin.requests import Generate
from twin_bench.twin.seq2seq import TwinSeq2Seq
from twin_bench.twin.seq2seq_requests import generate

pytestmark = pytest.mark.versions

KINDS = ["t5", "flan-t5", "mt5", "bart"]
MIXES = {name: weights / 2 if name == "any real number" else weights for name, weights in mixes(4, 3).items()}
"""Fusion weights of four rows. T5 does not scale its attention, so larger ones make its own rounding errors large."""


def sources(rows: int, seed: int = 0, pad: str = "right") -> dict[str, Tensor]:
    """Return token ids of lengths 9, 8, 7, 6, 9, ..., padded on one side."""
    ids = torch.randint(4, VOCABULARY, (rows, 9), generator=torch.Generator().manual_seed(seed))
    mask = torch.ones_like(ids)
    for row in range(rows):
        gap = row % 4
        mask[row, : gap if pad == "left" else 0] = 0
        mask[row, 9 - gap if pad == "right" else 9 :] = 0
    return {"input_ids": ids * mask, "attention_mask": mask}


def targets(rows: int) -> Tensor:
    return torch.randint(4, VOCABULARY, (rows, 7), generator=torch.Generator().manual_seed(9))


def unpadded(batch: dict[str, Tensor], row: int) -> Tensor:
    return batch["input_ids"][row][batch["attention_mask"][row].bool()][None]


@functools.cache
def references(families: Any, kind: str, mix: str) -> list[Any]:
    """Return the dense model of each of four rows."""
    return [dense(families(kind), weights) for weights in MIXES[mix]]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("mix", ["mixed", "any real number"])
@pytest.mark.parametrize("path", ["fused", "low-rank"])
def test_logits_equal_the_dense_fusion_of_every_sample(
    seq2seq_families: Any, seq2seq_twins: Any, kind: str, mix: str, path: str
) -> None:
    twin = TwinModel.from_pretrained(seq2seq_twins(kind))
    force_path(twin, path)
    weights, target = MIXES[mix], targets(4)
    for pad in ("right", "left"):
        batch = sources(4, pad=pad)
        found = twin(**batch, labels=target, fusion_weights=weights).logits
        for row, reference in enumerate(references(seq2seq_families, kind, mix)):
            with torch.no_grad():
                expected = reference(input_ids=unpadded(batch, row), labels=target[row : row + 1]).logits[0]
            assert (found[row].double() - expected).norm() <= 1e-5 * expected.norm()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("beams", [1, 3])
def test_texts_are_the_dense_models_own(seq2seq_families: Any, seq2seq_twins: Any, kind: str, beams: int) -> None:
    """The number of beams is an option, or the model's own."""
    twin = TwinModel.from_pretrained(seq2seq_twins(kind))
    batch, weights = sources(4, pad="left"), mixes(4, 3)["mixed"]
    texts = twin.generate(**batch, fusion_weights=weights, max_new_tokens=8, num_beams=beams, do_sample=False)
    twin.model.generation_config.num_beams = beams
    assert torch.equal(twin.generate(**batch, fusion_weights=weights, max_new_tokens=8, do_sample=False), texts)
    for row, reference in enumerate(references(seq2seq_families, kind, "mixed")):
        expected = reference.generate(unpadded(batch, row), max_new_tokens=8, num_beams=beams, do_sample=False)[0]
        assert texts[row, : len(expected)].tolist() == expected.tolist()
        assert set(texts[row, len(expected) :].tolist()) <= {twin.tokenizer.pad_token_id}
    assert len({tuple(text) for text in texts.tolist()}) > 1


def test_lists_give_each_text_its_own_length_and_log_probabilities(seq2seq_families: Any, seq2seq_twins: Any) -> None:
    """Greedy texts of any length share a batch, and are cut where each alone would end."""
    twin: Any = TwinModel.from_pretrained(seq2seq_twins("flan-t5"))
    prompts = [unpadded(sources(4), row)[0].tolist() for row in range(4)]
    asked = [Generate(prompt, length, likeliest=2) for prompt, length in zip(prompts, (2, 9, 5, 7), strict=True)]
    found = generate(twin, asked, batch_size=4, fusion_weights=MIXES["mixed"])
    for request, (text,), reference in zip(asked, found, references(seq2seq_families, "flan-t5", "mixed"), strict=True):
        source = torch.tensor([request.prompt])
        expected = reference.generate(source, max_new_tokens=request.max_new_tokens, do_sample=False)[0, 1:]
        assert text.tokens == [token for token in expected.tolist() if token != twin.tokenizer.eos_token_id]
        with torch.no_grad():
            logits = reference(input_ids=source, labels=expected[None]).logits[0, : len(text.tokens)]
        log_probs = logits.log_softmax(dim=-1)
        own = log_probs[range(len(text.tokens)), text.tokens]
        torch.testing.assert_close(torch.tensor(text.log_probs), own.float(), rtol=1e-4, atol=1e-4)
        most = log_probs.topk(2, dim=-1).indices.tolist()
        assert [[token for token, _ in place] for place in text.likeliest] == most
        assert len(text.tokens) + (text.end_token is not None) <= request.max_new_tokens
    with pytest.raises(InputError, match="an empty prompt"):
        generate(twin, [Generate([], 3)])


@pytest.mark.parametrize("kind", ["t5", "bart"])
def test_the_router_reads_the_encoders_hidden_states_of_the_source(
    seq2seq_families: Any, seq2seq_twins: Any, kind: str
) -> None:
    twin = TwinModel.from_pretrained(seq2seq_twins(kind))
    assert isinstance(twin, TwinSeq2Seq)
    shared = dense(seq2seq_families(kind), torch.zeros(3)).get_encoder()
    batch = sources(4, pad="left")
    depth = twin.backbone.config.num_hidden_layers
    layers = [0, 1, depth, -1]
    found = twin.features(batch, layers)
    for row in range(4):
        with torch.no_grad():
            states = shared(unpadded(batch, row), output_hidden_states=True)
        expected = [*states.hidden_states[:2], states.last_hidden_state, states.last_hidden_state]
        for own, state in zip(found, expected, strict=True):
            torch.testing.assert_close(own[row], state[0].mean(dim=0).float(), rtol=1e-4, atol=1e-5)
    assert twin.router is not None
    weights = twin.route(**batch)
    torch.testing.assert_close(twin.router.weights(found[-1]), weights)
    logits = [twin(**batch, labels=targets(4) + other).logits for other in (0, 1)]
    again = [twin(**batch, labels=targets(4) + other, fusion_weights=weights).logits for other in (0, 1)]
    torch.testing.assert_close(logits, again)


def test_what_a_forward_can_be_given(seq2seq_twins: Any) -> None:
    twin = TwinModel.from_pretrained(seq2seq_twins("bart"), routing="task")
    batch, target = sources(2), targets(2)
    logits = twin(**batch, labels=target, task=["bbq", "mmlu"]).logits
    start = torch.full((2, 1), 3)
    read = torch.cat([start, target[:, :-1]], dim=1)
    assert torch.equal(twin(**batch, decoder_input_ids=read, task=["bbq", "mmlu"]).logits, logits)
    one_hot = torch.eye(3)[[1, 0]]
    assert torch.equal(twin(**batch, labels=target, fusion_weights=one_hot).logits, logits)
    cut = target.masked_fill(torch.arange(7) > 4, -100)
    torch.testing.assert_close(twin(**batch, labels=cut, fusion_weights=one_hot).logits[:, :5], logits[:, :5])
    for wrong, says in (
        ({}, "give decoder_input_ids, what the decoder reads, or labels"),
        ({"labels": target, "decoder_input_ids": read}, "one of the two"),
        ({"labels": target[:1]}, r"labels has the shape \(1, 7\), not \(2, target length\)"),
        ({"labels": target.float()}, "labels is float32 on cpu, not int64 on cpu"),
        ({"labels": target + VOCABULARY}, "token 5.. in labels: the model's vocabulary has 300"),
        ({"decoder_input_ids": target - 500}, "token -.* in decoder_input_ids"),
        ({"labels": torch.full((2, 65), 5)}, "labels of 65 tokens; the model's window is 64"),
    ):
        with pytest.raises(InputError, match=says):
            twin(**batch, **wrong, fusion_weights=one_hot)
    for options, says in (
        ({"max_new_tokens": 64}, "64 tokens to generate behind 1; the decoder's window is 64: give max_new_tokens"),
        ({"max_length": 1}, "max_length 1: the decoder begins with 1 tokens"),
        ({"max_new_tokens": 5, "num_beams": 2, "num_return_sequences": 3}, "num_return_sequences"),
    ):
        with pytest.raises(InputError, match=says):
            twin.generate(**batch, fusion_weights=one_hot, **options)


def test_t5_reads_longer_sources_than_its_config_says(
    seq2seq_families: Any, seq2seq_twins: Any, tmp_path: Path
) -> None:
    """Its positions are relative. BART's end where its table does."""
    long = torch.randint(4, VOCABULARY, (1, 80), generator=torch.Generator().manual_seed(0))
    for kind in ("t5", "bart"):
        twin = TwinModel.from_pretrained(seq2seq_twins(kind))
        assert twin.max_length == 64
        recipe = {**seq2seq_families(kind).recipe, "max_length": 80, "router": None}
        if kind == "t5":
            assert twin(long, labels=long).logits.shape == (1, 80, VOCABULARY)
            assert TwinModel.from_pretrained(built(recipe, tmp_path / "twin")).max_length == 80
        else:
            with pytest.raises(InputError, match="an input of 80 tokens; the model's window is 64"):
                twin.route(long)
            with pytest.raises(InputError, match="max_length 80: the base model has a window of 64"):
                built(recipe, tmp_path / "none")


def test_an_untied_output_layer_is_fused_by_itself(seq2seq_families: Any, seq2seq_twins: Any) -> None:
    twin = TwinModel.from_pretrained(seq2seq_twins("flan-t5"))
    assert isinstance(twin, TwinSeq2Seq)
    twin.model.tie_weights()  # as lm-eval does once it has loaded a model
    weight = twin.model.lm_head.weight
    shared = references(seq2seq_families, "flan-t5", "none")[0].lm_head.weight
    torch.testing.assert_close(weight.double(), shared, rtol=1e-5, atol=1e-6)
    assert not torch.equal(weight, twin.model.shared.weight)


@pytest.mark.parametrize("kind", ["flan-t5", "bart"])
def test_a_saved_twin_is_the_same_twin(seq2seq_families: Any, seq2seq_twins: Any, kind: str, tmp_path: Path) -> None:
    first, again = seq2seq_twins(kind), built(seq2seq_families(kind).recipe, tmp_path / "again")
    files = sorted(file.relative_to(first) for file in first.rglob("*") if file.is_file())
    for file in files:
        assert (first / file).read_bytes() == (again / file).read_bytes()
    batch, weights = sources(3), mixes(3, 3)["diffuse"]
    twin = TwinModel.from_pretrained(first)
    logits = twin(**batch, labels=targets(3), fusion_weights=weights).logits
    for other in (TwinModel.from_pretrained(again), copy.deepcopy(twin)):
        assert torch.equal(other(**batch, labels=targets(3), fusion_weights=weights).logits, logits)
    half = TwinModel.from_pretrained(first, dtype="bfloat16")(**batch, labels=targets(3), fusion_weights=weights)
    assert 0 < (half.logits.float() - logits).norm() / logits.norm() < 0.1


def adapters(family: Any, root: Path, **options: Any) -> tuple[dict[str, str], dict[str, Any]]:
    """Return two LoRA experts of a family's base model on disk, and what peft merges of each."""
    merged = {}
    for index, name in enumerate(("mmlu", "bbq")):
        torch.manual_seed(index)
        config = peft.LoraConfig(task_type="SEQ_2_SEQ_LM", lora_alpha=3, **options)
        adapted = peft.get_peft_model(copy.deepcopy(family.base), config)
        for key, parameter in adapted.named_parameters():
            if "lora_" in key:
                parameter.data.normal_(std=0.3)
        adapted.save_pretrained(root / name)
        merged[name] = adapted.merge_and_unload().eval()
    return {name: str(root / name) for name in merged}, merged


@pytest.mark.parametrize(("kind", "targets_of"), [("t5", ["q", "v", "wo"]), ("bart", ["q_proj", "fc1"])])
def test_lora_experts_come_back_at_weight_one(
    seq2seq_families: Any, tmp_path: Path, kind: str, targets_of: list[str]
) -> None:
    """Density 1 and weight 1 is what peft merges. q and v are those of the cross-attention too."""
    family = seq2seq_families(kind)
    experts, merged = adapters(family, tmp_path, r=2, target_modules=targets_of)
    said = tmp_path / "bbq" / "adapter_config.json"  # an adapter need not say its task type: the base model does
    said.write_text(json.dumps({**json.loads(said.read_text()), "task_type": None}))
    recipe = {"base_model": family.recipe["base_model"], "experts": experts, "exclusive": {"density": 1.0}}
    directory = built(recipe, tmp_path / "twin")
    assert (
        json.loads((directory / "experts" / "bbq" / "adapter_config.json").read_text())["task_type"] == "SEQ_2_SEQ_LM"
    )
    twin, ids, target = TwinModel.from_pretrained(directory), sources(3)["input_ids"], targets(3)
    for index, (name, model) in enumerate(merged.items()):
        with torch.no_grad():
            expected = model(ids, labels=target).logits
        found = twin(ids, labels=target, fusion_weights=torch.eye(2)[index].repeat(3, 1)).logits
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
        shared = transformers.AutoModelForSeq2SeqLM.from_pretrained(directory / "model")
        adapted = peft.PeftModel.from_pretrained(shared, str(directory / "experts" / name)).eval()
        with torch.no_grad():
            torch.testing.assert_close(adapted(ids, labels=target).logits, expected, rtol=1e-4, atol=1e-4)


def test_lora_experts_merge_to_one_adapter(seq2seq_families: Any, tmp_path: Path) -> None:
    family = seq2seq_families("t5")
    experts, merged = adapters(family, tmp_path, r=2, target_modules=["q", "wo"])
    recipe = {"base_model": family.recipe["base_model"], "experts": experts, "merge": {"method": "average"}}
    merge_to_directory(MergeRecipe.model_validate({**recipe, "as_adapter": True}), tmp_path / "adapter")
    merge_to_directory(MergeRecipe.model_validate(recipe), tmp_path / "merged")
    adapted = peft.PeftModel.from_pretrained(copy.deepcopy(family.base), str(tmp_path / "adapter")).eval()
    whole = transformers.AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "merged")
    mean = copy.deepcopy(family.base)
    states = [dict(model.named_parameters()) for model in merged.values()]
    mean.load_state_dict({n: torch.stack([s[n] for s in states]).mean(dim=0) for n in states[0]}, strict=False)
    given = {"input_ids": sources(2)["input_ids"], "labels": targets(2)}
    with torch.no_grad():
        expected = mean(**given).logits
        torch.testing.assert_close(adapted(**given).logits, expected, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(whole(**given).logits, expected, rtol=1e-4, atol=1e-4)
    on_table, _ = adapters(family, tmp_path / "tied", r=2, target_modules=["shared"])
    wrong = MergeRecipe.model_validate({**recipe, "experts": on_table, "as_adapter": True})
    with pytest.raises(InputError, match=r"shared\.weight is tied to .*, which an adapter does not change"):
        merge_to_directory(wrong, tmp_path / "wrong")


def test_protocol_paper_fuses_a_and_b_separately(seq2seq_families: Any, tmp_path: Path) -> None:
    """W_0 + s B(x) A(x), each factor lambda sum_t X_t + sum_t w_t SVD_r(X_t - lambda sum_t X_t)."""
    family = seq2seq_families("t5")
    experts, _ = adapters(family, tmp_path, r=4, target_modules=["q", "v"])
    recipe = {**family.recipe, "experts": experts, "router": None}
    twin = TwinModel.from_pretrained(built(recipe, tmp_path / "twin"), protocol="paper")
    weights, ids, target = torch.tensor([[0.7, 0.3], [0.0, 1.0]]), sources(2)["input_ids"], targets(2)
    found = twin(ids, labels=target, fusion_weights=weights).logits
    stored = [load_file(tmp_path / name / "adapter_model.safetensors") for name in experts]
    for row in range(2):
        model = copy.deepcopy(family.base).double()
        for key in stored[0]:
            if "lora_A" not in key:
                continue
            sides = []
            for side in (key, key.replace("lora_A", "lora_B")):
                own = [tensors[side].double() for tensors in stored]
                shared = SCALING * sum(own)
                rank = int(round(DENSITY, 12) * min(shared.shape))
                svds = [torch.linalg.svd(tensor - shared, full_matrices=False) for tensor in own]
                kept = [(U[:, :rank] * S[:rank]) @ Vh[:rank] for U, S, Vh in svds]
                sides.append(shared + sum(float(w) * v for w, v in zip(weights[row], kept, strict=True)))
            layer = model.get_submodule(key.removeprefix("base_model.model.").partition(".lora_A")[0])
            layer.weight.data += 3 / 4 * sides[1] @ sides[0]
        with torch.no_grad():
            expected = model(ids[row : row + 1], labels=target[row : row + 1]).logits[0]
        assert (found[row].double() - expected).norm() <= 1e-5 * expected.norm()
    full = built({**family.recipe, "router": None}, tmp_path / "full")
    with pytest.raises(InputError, match="protocol paper adds the factors of LoRA adapters"):
        TwinModel.from_pretrained(full, protocol="paper")
    routed = TwinModel.from_pretrained(full, protocol="routed")
    given = {"labels": target, "fusion_weights": mixes(2, 3)["diffuse"]}
    assert torch.equal(routed(ids, **given).logits, TwinModel.from_pretrained(full)(ids, **given).logits)


def test_tables_under_another_name_and_buffers(seq2seq_families: Any, tmp_path: Path) -> None:
    """A checkpoint may hold a shared table under one of its other names, and a bias that nobody trains."""
    family = seq2seq_families("bart")
    bias = torch.randn(1, VOCABULARY, generator=torch.Generator().manual_seed(0))
    for name in ("base", "mmlu", "bbq"):
        family.base.save_pretrained(tmp_path / name) if name == "base" else family.experts[name].save_pretrained(
            tmp_path / name
        )
        tensors = load_file(tmp_path / name / "model.safetensors")
        tensors["model.encoder.embed_tokens.weight"] = tensors.pop("model.shared.weight")
        tensors["final_logits_bias"] = bias
        save_file(tensors, tmp_path / name / "model.safetensors", metadata={"format": "pt"})
    tiny_seq2seq_tokenizer().save_pretrained(tmp_path / "base")
    experts = {name: str(tmp_path / name) for name in ("mmlu", "bbq")}
    recipe = {"base_model": str(tmp_path / "base"), "experts": experts, "exclusive": {"density": 1.0}}
    twin = TwinModel.from_pretrained(built(recipe, tmp_path / "twin"))
    ids, target = sources(2)["input_ids"], targets(2)
    with torch.no_grad():
        expected = family.experts["bbq"](ids, labels=target).logits + bias
    found = twin(ids, labels=target, fusion_weights=torch.tensor([[0.0, 1.0]] * 2)).logits
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    tensors["final_logits_bias"] = bias + 1
    save_file(tensors, tmp_path / "bbq" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match="expert 'bbq': final_logits_bias differs from the base model's"):
        built(recipe, tmp_path / "again")


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"architectures": ["LlavaForConditionalGeneration"]}, "is LlavaForConditionalGeneration; twins are made of"),
        ({"architectures": ["T5EncoderModel"]}, "is T5EncoderModel; twins are made of"),
        ({"model_type": "bert"}, "model_type is bert, the base model's is t5"),
        ({"relative_attention_max_distance": 20}, "relative_attention_max_distance is 20, the base model's is 16"),
        ({"dense_act_fn": "gelu"}, "dense_act_fn is gelu, the base model's is relu"),
        ({"scale_decoder_outputs": False}, "scale_decoder_outputs is False, the base model's is"),
    ],
)
def test_experts_that_cannot_be_served(
    seq2seq_families: Any, tmp_path: Path, change: dict[str, Any], says: str
) -> None:
    family = seq2seq_families("t5")
    family.experts["bbq"].save_pretrained(tmp_path / "bbq")
    file = tmp_path / "bbq" / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **change}))
    recipe = {**family.recipe, "experts": {"bbq": str(tmp_path / "bbq")}, "router": None}
    with pytest.raises(InputError, match=says):
        built(recipe, tmp_path / "twin")
    assert not (tmp_path / "twin").exists()


def test_a_shared_weight_that_is_no_table_is_refused() -> None:
    first, second = nn.Linear(3, 3), nn.Linear(3, 3)
    second.weight = first.weight
    model = nn.ModuleDict({"first": first, "second": second})
    with pytest.raises(InputError, match="second is a Linear that shares its weight with another layer"):
        install(model, {"one": Exclusive({"first.weight": Factors(torch.ones(3, 1), torch.ones(1, 3))}, {})})


def test_mpnets_biases_are_each_rows_own_as_t5s_are() -> None:
    """As many rows as tokens: a table that is looked up without rows would be fused by the wrong ones in silence."""
    torch.manual_seed(0)
    shape = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 40}
    config = transformers.MPNetConfig(vocab_size=40, max_position_embeddings=40, **shape)
    model = transformers.MPNetForSequenceClassification(config).eval().double()
    name = "mpnet.encoder.relative_attention_bias.weight"
    own = [Factors(torch.randn(32, 2).double(), torch.randn(2, 2).double()) for _ in range(2)]
    twin = copy.deepcopy(model)
    fusion = install(twin, {str(index): Exclusive({name: factors}, {}) for index, factors in enumerate(own)})
    ids, weights = torch.tensor([[5, 6, 7], [8, 9, 5], [7, 7, 6]]), torch.tensor([[0.3, 0.7], [1.0, 0.0], [-0.5, 2.0]])
    with torch.no_grad(), fusion.per_row(weights.double()):
        found = twin(ids).logits
    for row, mix in enumerate(weights.tolist()):
        merged = copy.deepcopy(model)
        with torch.no_grad():
            merged.get_parameter(name).add_(sum(w * B @ A for w, (B, A) in zip(mix, own, strict=True)))
            torch.testing.assert_close(found[row], merged(ids[row : row + 1]).logits[0], rtol=1e-6, atol=1e-9)

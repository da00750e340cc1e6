"""Twins over several devices, by accelerate's own dispatch: their answers are those of one device."""

from __future__ import annotations

import errno
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.support.dense import batch, mixes
from tests.support.families import built
from twin_bench import InputError, TwinModel
from twin_bench.compat import SINCE_5
from twin_bench.twin.directory import load_parts
from twin_bench.twin.exclusive import Exclusive
from twin_bench.twin.layers import TwinLayer
from twin_bench.twin.placement import Devices, find_placement
from twin_bench.twin.requests import Generate, Score, generate, score

pytestmark = [pytest.mark.versions, pytest.mark.skipif(not SINCE_5, reason="they need transformers 5")]

LLAMA = {"model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk", "model.norm": "disk"}
"""The tiny Llama's output layer is tied to its embeddings, so it has to be where they are."""
MAPS: dict[str, dict[str, str]] = {
    "llama": {**LLAMA, "model.rotary_emb": "cpu", "lm_head": "cpu"},
    "gpt2": {
        **{"transformer.wte": "disk", "transformer.wpe": "disk", "transformer.h.0": "disk", "transformer.h.1": "cpu"},
        **{"transformer.ln_f": "disk", "lm_head": "disk"},
    },
    "bert": {
        **{"bert.embeddings": "disk", "bert.encoder.layer.0": "cpu", "bert.encoder.layer.1": "disk"},
        **{"bert.pooler": "disk", "classifier": "disk"},
    },
    "t5": {
        **{"shared": "disk", "encoder.block.0": "disk", "encoder.block.1": "cpu", "encoder.block.2": "disk"},
        **{"encoder.final_layer_norm": "disk", "encoder.embed_tokens": "disk", "decoder.embed_tokens": "disk"},
        **{"decoder.block.0": "cpu", "decoder.block.1": "disk", "decoder.final_layer_norm": "cpu", "lm_head": "disk"},
    },
}
"""Maps that split the layers of a tiny model between the processor and the disk."""
EVERYTHING = {"": "disk"}
ROWS = 6


@pytest.fixture
def directory(twins: Any, causal_twins: Any, seq2seq_twins: Any) -> Any:
    kinds = {"bert": twins, "t5": seq2seq_twins}
    return lambda kind: kinds.get(kind, causal_twins)(kind)


def logits(twin: Any, mix: str) -> Tensor:
    """Return the logits of rows with fusion weights of their own, or the router's for `routed`."""
    inputs = {name: tensor.to(twin.device) for name, tensor in batch(ROWS).items()}
    weights = None if mix == "routed" else mixes(ROWS, 3)[mix]
    options: dict[str, Any] = {"fusion_weights": weights}
    if twin.task_type == "sequence_classification":
        options["task"] = [twin.expert_names[row % 3] for row in range(ROWS)]
    elif twin.task_type == "seq2seq_lm":
        options["decoder_input_ids"] = inputs["input_ids"]
    found: Tensor = twin(**inputs, **options).logits
    return (found[inputs["attention_mask"].bool()] if twin.task_type == "causal_lm" else found).cpu()


@pytest.mark.parametrize("kind", list(MAPS))
@pytest.mark.parametrize("place", ["split", "disk"])
def test_logits_are_those_of_one_device(directory: Any, kind: str, place: str) -> None:
    alone = TwinModel.from_pretrained(directory(kind))
    twin = TwinModel.from_pretrained(directory(kind), device_map=MAPS[kind] if place == "split" else EVERYTHING)
    offloaded = [layer for layer in twin.fusion.layers if layer.weight.is_meta]
    assert offloaded
    assert (len(offloaded) < len(twin.fusion.layers)) == (place == "split" or kind == "t5")  # T5's tables of positions
    for mix in ("routed", "diffuse", "one_hot", "equal", "none", "routed"):
        torch.testing.assert_close(logits(twin, mix), logits(alone, mix), rtol=1e-5, atol=1e-5)
    assert all(layer.weight.is_meta for layer in offloaded)
    assert {layer.fused_weight for layer in twin.model.modules() if isinstance(layer, TwinLayer)} == {None}


def test_lists_of_requests_are_answered_as_on_one_device(directory: Any) -> None:
    """Prefixes are shared, texts are generated with a cache, and equal weights are not fused."""
    alone = TwinModel.from_pretrained(directory("llama"))
    twin = TwinModel.from_pretrained(directory("llama"), device_map=MAPS["llama"])
    prompts = [list(range(4, 22)), [*range(4, 22), 9], [5, 6, 7, 8], [11, 12, 13]]
    asked = [Score(prompt, [row + 4, 6]) for row, prompt in enumerate(prompts)]
    for one, other in zip(score(twin, asked), score(alone, asked), strict=True):
        torch.testing.assert_close(one.log_probs, other.log_probs)
        assert one.weights == pytest.approx(other.weights, abs=1e-6)
    wanted = [Generate(prompt, steps) for prompt in prompts for steps in (1, 5)]
    texts = [[[text.tokens for text in texts] for texts in generate(own, wanted)] for own in (twin, alone)]
    assert texts[0] == texts[1]


@pytest.mark.parametrize("kind", ["bernoulli", "sign_mask"])
def test_entries_of_offloaded_layers_are_added(causal_families: Any, tmp_path: Path, kind: str) -> None:
    exclusive = {"kind": kind, "density": 0.3}
    directory = built({**causal_families("llama").recipe, "exclusive": exclusive}, tmp_path / "twin")
    alone, twin = TwinModel.from_pretrained(directory), TwinModel.from_pretrained(directory, device_map=EVERYTHING)
    for mix in ("diffuse", "one_hot"):
        torch.testing.assert_close(logits(twin, mix), logits(alone, mix), rtol=1e-5, atol=1e-5)


def test_a_scoring_pass_goes_on_where_layers_are_offloaded(families: Any, tmp_path: Path) -> None:
    """Blocks that are skipped have accelerate's forward again afterwards."""
    recipe = families("bert").recipe
    settings = {"exclusive": {"rank": 3, "from_layer": 1}, "router": {**recipe["router"], "layer": 1}}
    directory = built({**recipe, **settings}, tmp_path / "twin")
    alone, twin = (TwinModel.from_pretrained(directory, device_map=given) for given in (None, MAPS["bert"]))
    assert twin._start.layer == 1  # type: ignore[attr-defined]
    rows, tasks = [("the cat", None), ("a dog", "sat"), ("is it", None)], ["cola", "mnli", "stsb"]
    for _ in range(2):
        found = [own.classify(rows, tasks) for own in (twin, alone)]  # type: ignore[attr-defined]
        for one, other in zip(*found, strict=True):
            torch.testing.assert_close(one.logits, other.logits)


def test_kept_features_are_told_apart(directory: Any, tmp_path: Path) -> None:
    """Those of offloaded weights are found again, and those of other weights are not."""
    rows = [[4, 5, 6], [7, 8]]
    found = []
    for number, device_map in enumerate((EVERYTHING, EVERYTHING, None)):
        twin = TwinModel.from_pretrained(directory("llama"), device_map=device_map)
        twin.feature_cache = tmp_path
        found.append(twin.features_of([{"input_ids": ids} for ids in rows], [1], batch_size=2)[0])
        assert len(list(tmp_path.glob("*.safetensors"))) == (2 if number == 2 else 1)
    torch.testing.assert_close(found[0], found[2])


def sizes(model: Any, device_map: dict[str, Any], exclusive: dict[str, Exclusive], copies: bool) -> dict[str, int]:
    """Return the bytes that each place of a map is to hold: parameters, factors, vectors and fused copies."""

    def place(name: str) -> str:
        return next(str(device) for part, device in device_map.items() if not part or name.startswith(f"{part}."))

    held = {str(device): 0 for device in device_map.values()}
    for name, parameter in model.named_parameters():
        held[place(name)] += parameter.nbytes
        own = [tensor for e in exclusive.values() for tensor in e.factors.get(name, ())]
        own += [e.vectors[name] for e in exclusive.values() if name in e.vectors]
        held[place(name)] += sum(tensor.nbytes for tensor in own)
        held[place(name)] += parameter.nbytes if copies and parameter.ndim == 2 and "embed" not in name else 0
    return held


def test_what_experts_add_counts_in_a_planned_map(directory: Any) -> None:
    twin = TwinModel.from_pretrained(directory("llama"))
    parts, config = load_parts(directory("llama")), twin.model.config
    whole = sizes(twin.model, {"": "cpu"}, dict(parts.exclusive), copies=True)["cpu"]
    bare = sizes(twin.model, {"": "cpu"}, dict(parts.exclusive), copies=False)["cpu"]
    plain = sum(parameter.nbytes for parameter in twin.model.parameters())
    assert plain < bare < whole

    def planned(limit: int) -> Any:
        return find_placement(Devices("auto", {"cpu": limit}), config, "causal_lm", parts.exclusive, torch.float32)

    roomy, tight, small = planned(2 * whole), planned(whole - 1), planned(int(0.95 * bare))
    assert roomy == ({"": "cpu"}, True)
    assert not tight.copies
    assert not small.copies
    assert set(small.device_map.values()) == {"cpu", "disk"}
    assert sizes(twin.model, small.device_map, dict(parts.exclusive), copies=False)["cpu"] <= 0.95 * bare


def test_without_room_for_copies_nothing_is_fused(directory: Any) -> None:
    alone = TwinModel.from_pretrained(directory("gpt2"))
    limit = sum(parameter.nbytes for parameter in alone.model.parameters())
    twin = TwinModel.from_pretrained(directory("gpt2"), device_map="auto", max_memory={"cpu": int(1.9 * limit)})
    assert not twin.fusion.keeps_copies
    torch.testing.assert_close(logits(twin, "equal"), logits(alone, "equal"), rtol=1e-5, atol=1e-5)
    assert {layer.fused_weight for layer in twin.model.modules() if isinstance(layer, TwinLayer)} == {None}


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (
            {"device_map": {**MAPS["llama"], "model.layers.0": "cuda:7"}},
            "device_map: model.layers.0: device 'cuda:7': ",
        ),
        ({"device_map": {**MAPS["llama"], "model.layers.0": 7}}, "device_map: model.layers.0: device 'cuda:7': "),
        ({"device_map": {**MAPS["llama"], "lm_head": "disk"}}, "lm_head.weight and model.embed_tokens.weight are one"),
        ({"device_map": LLAMA | {"model.layer.1": "cpu"}}, "'model.layer.1', which the model lacks; did you mean"),
        (
            {"device_map": {part: where for part, where in MAPS["llama"].items() if part != "model.layers.1"}},
            "device_map leaves out model.layers.1.input_layernorm.weight and 8 more; name a device for each part",
        ),
        ({"device_map": MAPS["llama"] | {"model": "cpu"}}, "device_map places model.embed_tokens twice, by its own"),
        ({"device_map": "autto"}, "device_map: device 'autto'"),
        ({"device_map": "auto", "max_memory": {"cpu": "much"}}, "max_memory {'cpu': 'much'}: "),
        ({"device_map": "auto", "max_memory": {7: "1GiB"}}, "max_memory: device 'cuda:7': "),
        ({"max_memory": {"cpu": "1GiB"}}, "max_memory {'cpu': '1GiB'}: it is for several devices; give device_map"),
        ({"device_map": "auto", "device": "cpu"}, "device 'cpu' and device_map 'auto': give one of the two"),
        ({"device_map": EVERYTHING, "protocol": "paper"}, "protocol paper computes with weights of its own"),
    ],
)
def test_what_does_not_suit_is_said_in_one_line(directory: Any, options: dict[str, Any], says: str) -> None:
    kind = "bert" if "protocol" in options else "llama"
    with pytest.raises(InputError, match=re.escape(says)):
        TwinModel.from_pretrained(directory(kind), **options)


def test_an_offload_folder_is_one_that_can_be_written(directory: Any, tmp_path: Path, monkeypatch: Any) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"weights\.safetensors: can't be written"):
        TwinModel.from_pretrained(directory("llama"), device_map=EVERYTHING, offload_folder=tmp_path / "file")

    def full(*arguments: Any, **options: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("transformers.AutoModelForCausalLM.from_pretrained", full)
    with pytest.raises(InputError, match=r"offload_folder .*: weights can't be written there \(No space left"):
        TwinModel.from_pretrained(directory("llama"), device_map=EVERYTHING, offload_folder=tmp_path / "other")


def test_a_twin_on_several_devices_is_not_moved(directory: Any) -> None:
    twin = TwinModel.from_pretrained(directory("llama"), device_map=EVERYTHING)
    with pytest.raises(InputError, match="can't be moved or converted; load it anew"):
        twin.to(torch.bfloat16)


@pytest.mark.gpu
@pytest.mark.parametrize("places", [("cpu", 0), (0, "disk"), ("disk", "cpu"), (0, 1)])
def test_logits_are_those_of_one_device_on_gpus(directory: Any, places: tuple[Any, Any]) -> None:
    if places[1] == 1 and torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    device_map = {**dict.fromkeys(MAPS["llama"], 0), "model.layers.0": places[0], "model.layers.1": places[1]}
    alone = TwinModel.from_pretrained(directory("llama"))
    twin = TwinModel.from_pretrained(directory("llama"), device_map=device_map)
    assert twin.device.type == "cuda"
    for mix in ("routed", "diffuse", "one_hot", "equal", "none"):
        torch.testing.assert_close(logits(twin, mix), logits(alone, mix), rtol=1e-4, atol=1e-4)

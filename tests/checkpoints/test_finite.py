"""NaN, inf and dtypes that weights don't have: an error where they first appear, which names file and tensor."""

from __future__ import annotations

import shutil
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import twin_bench
from tests.support.merges import EXPERTS, STATIC, models
from tests.support.models import tiny_classifier
from twin_bench import InputError
from twin_bench.adaptive.learning import Learning
from twin_bench.checkpoints.adapter import open_expert
from twin_bench.checkpoints.checkpoint import open_checkpoint
from twin_bench.checkpoints.peft_files import save_tensors
from twin_bench.checkpoints.skeleton import read_config, skeleton_of
from twin_bench.twin.exclusive import exclusive_vector

QUERY = "bert.encoder.layer.0.attention.self.query.weight"
NO_WEIGHTS = [torch.int8, torch.int32, torch.bool, torch.complex64, torch.float8_e4m3fn]


def stored(tmp_path: Path, change: dict[str, Tensor]) -> Path:
    base = tiny_classifier("bert")
    base.save_pretrained(tmp_path / "base")
    shutil.copytree(tmp_path / "base", tmp_path / "changed")
    save_file({**load_file(tmp_path / "base" / "model.safetensors"), **change}, tmp_path / "changed/model.safetensors")
    return tmp_path / "changed"


@pytest.mark.parametrize("dtype", NO_WEIGHTS)
@pytest.mark.parametrize("name", [QUERY, "classifier.weight"])
def test_a_checkpoint_of_codes_is_refused_by_name(tmp_path: Path, dtype: torch.dtype, name: str) -> None:
    shape = (24, 24) if name == QUERY else (2, 24)
    directory = stored(tmp_path, {name: torch.ones(shape).to(dtype)})
    skeleton = skeleton_of(read_config(directory), "sequence_classification")
    with pytest.raises(InputError, match=f"changed: tensor {name} is {str(dtype).removeprefix('torch.')}; weights are"):
        open_checkpoint(directory, skeleton).head()


@pytest.mark.parametrize("which", ["base", "expert"])
@pytest.mark.parametrize("dtype", NO_WEIGHTS)
@pytest.mark.parametrize("method", ["average", "ties", "iso_c", "emr", "pcb"])
def test_a_merge_of_codes_is_refused_by_name(method: str, dtype: torch.dtype, which: str) -> None:
    """A cast would drop the imaginary part, or take codes for weights; an integer base would drop the experts."""
    base, tuned = models()
    changed = base if which == "base" else tuned["task1"]
    changed["tall"] = (100 * changed["tall"]).to(dtype)
    inputs = {"task": "task0"} if method == "emr" else {}
    with pytest.raises(InputError, match=rf"tensor tall.*\b{str(dtype).removeprefix('torch.')}\b"):
        twin_bench.merge(method, base, tuned, **inputs)


def test_equal_buffers_and_counters_are_the_bases() -> None:
    base, tuned = models()
    base |= {"mask": torch.ones(3, dtype=torch.bool), "batches": torch.tensor(7)}
    for number, expert in enumerate(tuned.values()):
        expert |= {"mask": torch.ones(3, dtype=torch.bool), "batches": torch.tensor(number)}
    del tuned["task2"]["mask"]
    merged = twin_bench.merge("average", base, tuned)
    assert torch.equal(merged["mask"], base["mask"])
    assert merged["batches"] == 7


@pytest.mark.parametrize(
    "value", [float("nan"), float("inf"), -float("inf"), 10**400], ids=["nan", "inf", "-inf", "huge"]
)
@pytest.mark.parametrize("name", STATIC)
def test_options_that_are_not_finite_are_refused_by_name(name: str, value: float) -> None:
    base, tuned = models(experts=EXPERTS[name])
    for option, default in twin_bench.methods()[name].defaults.items():
        if isinstance(default, int | float) or option == "alpha":
            with pytest.raises(InputError, match=f"^{name}: {option} must be a .*number"):
                twin_bench.merge(name, base, tuned, **{option: value})


@pytest.mark.parametrize("name", [name for name in STATIC if "scaling" in twin_bench.methods()[name].defaults])
def test_a_merge_that_overflows_is_refused_by_name(name: str) -> None:
    base, tuned = models(torch.float16)
    with pytest.raises(InputError, match=rf"{name}: tensor \w+ overflows float16; .*lower the scaling"):
        twin_bench.merge(name, base, tuned, scaling=1e9)


def test_a_difference_that_overflows_is_no_fault_of_a_checkpoint() -> None:
    base, tuned = models()
    base["wide"], tuned["task1"]["wide"] = torch.full((5, 33), 3e38), torch.full((5, 33), -3e38)
    with pytest.raises(InputError, match="task vectors: tensor wide overflows float32"):
        twin_bench.merge("average", base, tuned)
    base["wide"] = torch.full((5, 33), torch.inf)
    with pytest.raises(InputError, match="base model: tensor wide holds NaN or inf"):
        twin_bench.merge("average", base, tuned)


@pytest.mark.parametrize("part", ["lora_A", "lora_B", "modules_to_save", "lora_embedding_A"])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_adapters_with_nan_are_refused_when_a_factor_is_read(tmp_path: Path, part: str, bad: float) -> None:
    base = tiny_classifier("bert")
    base.save_pretrained(tmp_path / "base")
    skeleton = skeleton_of(base.config, "sequence_classification")
    lora = peft.LoraConfig(
        task_type="SEQ_CLS", target_modules=["query", "word_embeddings"], r=2, modules_to_save=["classifier"]
    )
    peft.get_peft_model(tiny_classifier("bert", like=base, noise=0.0), lora).save_pretrained(tmp_path / "adapter")
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    tensors = load_file(file)
    key = next(k for k in tensors if part in k or (part == "modules_to_save" and "classifier" in k))
    save_file({**tensors, key: torch.full_like(tensors[key], bad)}, file)
    checkpoint = open_checkpoint(tmp_path / "base", skeleton)

    def read_all() -> None:
        expert = open_expert(tmp_path / "adapter", checkpoint, skeleton)
        for pair in expert.low_rank.values():
            pair.A(), pair.B()
        expert.head()

    with pytest.raises(InputError, match=rf"adapter: tensor {key} holds NaN or inf"):
        read_all()


@pytest.mark.parametrize("shape", [(7,), (6, 5)])
def test_exclusive_vectors_that_are_not_finite_are_refused(shape: tuple[int, ...]) -> None:
    shared = {"x": torch.zeros(shape)}
    for bad, message in ((torch.nan, "expert: tensor x holds NaN"), (torch.inf, "expert: tensor x holds NaN")):
        with pytest.raises(InputError, match=message):
            exclusive_vector({"x": torch.full(shape, bad)}, shared, rank=2)
    with pytest.raises(InputError, match="exclusive vectors: tensor x overflows float32"):
        exclusive_vector({"x": torch.full(shape, 3e38)}, {"x": torch.full(shape, -3e38)}, rank=2)


def test_a_twin_stores_no_nan(tmp_path: Path) -> None:
    """Heads, routers, biases and exclusive vectors are all stored by this function."""
    (tmp_path / "router").mkdir()
    with pytest.raises(InputError, match=r"router/router\.safetensors: tensor layers\.0\.weight holds NaN or inf"):
        save_tensors({"layers.0.weight": torch.tensor([torch.nan])}, tmp_path / "router" / "router.safetensors")
    assert not list((tmp_path / "router").iterdir())


def test_learning_that_diverges_stops_and_stores_nothing(tmp_path: Path) -> None:
    parameters = {"gate": torch.ones(3)}

    def gradients() -> None:
        parameters["gate"].grad = torch.tensor([0.0, torch.nan, 0.0])

    file = tmp_path / "learning.safetensors"
    with pytest.raises(InputError, match="wemoe: gate holds NaN or inf after step 1; lower learning_rate"):
        Learning(file).descend(parameters, gradients, method="wemoe", steps=1, learning_rate=0.1)
    assert not file.exists()

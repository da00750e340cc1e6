"""What vLLM serves: ranks that it takes, the command line, and the router for the front."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file

from tests.support.dense import batch
from tests.support.families import Family, built
from twin_bench import InputError, TwinModel
from twin_bench.export.run import export_twin
from twin_bench.export.served import read_served

IDS = batch(4)["input_ids"].clamp(min=4)


@pytest.fixture(scope="module")
def exported(matrix_twin: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("vllm") / "out"
    export_twin(matrix_twin, out, to="vllm", weights=["calm=0.5,0.25,0"])
    return out


def test_adapters_have_one_rank_that_vllm_takes(exported: Path) -> None:
    for name, rank in {"mmlu": 16, "bbq": 16, "cnn_dailymail": 16, "calm": 32}.items():
        folder = exported / "adapters" / name
        config = json.loads((folder / "adapter_config.json").read_text())
        assert (config["r"], config["lora_alpha"], config["rank_pattern"], config["bias"]) == (rank, rank, {}, "none")
        assert not config["modules_to_save"]
        for key, tensor in load_file(folder / "adapter_model.safetensors").items():
            assert key.startswith("base_model.model.model.layers.")
            assert tensor.shape["lora_B" in key] == rank, key


def test_the_padded_adapters_compute_the_twin(exported: Path, matrix_twin: Path) -> None:
    twin: Any = TwinModel.from_pretrained(matrix_twin)
    base: Any = peft.PeftModel.from_pretrained(
        transformers.AutoModelForCausalLM.from_pretrained(exported / "model"), exported / "adapters" / "calm"
    )
    expected = twin(IDS, fusion_weights=torch.tensor([[0.5, 0.25, 0]]).repeat(4, 1)).logits
    with torch.no_grad():
        torch.testing.assert_close(base.eval()(input_ids=IDS).logits, expected, rtol=1e-4, atol=1e-5)


def test_the_command_line_names_every_adapter(exported: Path) -> None:
    script = exported / "serve.sh"
    assert script.stat().st_mode & 0o111
    line = shlex.split(script.read_text(), comments=True)
    line = [word for word in line if word.strip()]
    assert line[line.index("exec") + 1 : line.index("exec") + 4] == ["vllm", "serve", "model"]
    assert line[line.index("--max-lora-rank") + 1] == "32"
    assert line[line.index("--max-loras") + 1] == "4"
    modules = line[line.index("--lora-modules") + 1 : line.index("$@")]
    assert modules == [f"{name}=adapters/{name}" for name in ("mmlu", "bbq", "cnn_dailymail", "calm")]
    assert all((exported / module.partition("=")[2] / "adapter_config.json").is_file() for module in modules)


def test_the_front_s_file_says_the_weights(exported: Path, matrix_twin: Path) -> None:
    served = read_served(exported)
    assert served.experts == ("mmlu", "bbq", "cnn_dailymail")
    assert served.adapters["calm"] == (0.5, 0.25, 0)
    assert served.max_length == 64
    assert (exported / "router" / "router.safetensors").read_bytes() == (
        matrix_twin / "router" / "router.safetensors"
    ).read_bytes()


def test_what_vllm_cannot_serve_is_named(causal_twins: Any, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"model\.embed_tokens\.weight \(an embedding, which vLLM takes no adapter on"):
        export_twin(causal_twins("qwen2"), tmp_path / "out", to="vllm")
    with pytest.raises(InputError, match=r"lm_head\.weight \(the output layer"):
        export_twin(causal_twins("qwen2"), tmp_path / "out", to="vllm")
    with pytest.raises(InputError, match=r"layer of the class Conv1D"):
        export_twin(causal_twins("gpt2"), tmp_path / "out", to="vllm")
    assert not list(tmp_path.iterdir())


def test_a_rank_over_vllm_s_is_refused(
    matrix_family: Family, matrix_twin: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("twin_bench.export.formats.vllm.RANKS", (8,))
    with pytest.raises(InputError, match=r"mmlu: model\.layers\.0\.\S+ has rank 12, and vLLM takes 8 at most"):
        export_twin(matrix_twin, tmp_path / "out", to="vllm")


def test_a_twin_without_router_is_served_without_front(matrix_family: Family, tmp_path: Path) -> None:
    twin = built({**matrix_family.recipe, "router": None}, tmp_path / "twin")
    export_twin(twin, tmp_path / "out", to="vllm")
    assert not (tmp_path / "out" / "router").exists()
    assert "no router" in (tmp_path / "out" / "README.md").read_text()

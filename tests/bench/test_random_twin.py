"""A twin of random numbers can be loaded and asked, and has the shapes that were asked for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.models import tiny_causal_config, tiny_config
from tests.support.rows import write_generative_rows, write_rows
from twin_bench import TwinModel
from twin_bench.bench.random_twin import Shape, write_random_twin
from twin_bench.errors import InputError


def test_a_classifier_of_random_numbers(tmp_path: Path) -> None:
    shape = Shape(lambda: tiny_config("roberta"), "sequence_classification", torch.float32, True)
    data = write_rows(tmp_path / "data")
    write_random_twin(tmp_path / "twin", shape, data, experts=4, rank=2)
    twin: Any = TwinModel.from_pretrained(tmp_path / "twin")
    assert twin.expert_names == ("cola", "stsb", "mnli", "expert0")
    assert {layer.ranks for layer in twin.fusion.layers if layer.is_matrix} == {(2,) * 4}
    assert any(layer.bias_vectors is not None for layer in twin.fusion.layers)
    ids = torch.tensor([[2, 5, 6, 3]])
    assert len({tuple(twin(ids, task="mnli", fusion_weights=w[None]).logits[0].tolist()) for w in torch.eye(4)}) == 4


def test_a_language_model_of_random_numbers(tmp_path: Path) -> None:
    shape = Shape(lambda: tiny_causal_config("llama"), "causal_lm", torch.bfloat16, False)
    write_random_twin(tmp_path / "twin", shape, write_generative_rows(tmp_path / "data"), experts=2, rank=2)
    twin = TwinModel.from_pretrained(tmp_path / "twin")
    assert twin.model.dtype == torch.bfloat16
    assert twin.route(torch.tensor([[5, 6, 7]])).shape == (1, 2)
    with pytest.raises(InputError, match="no rows of"):
        write_random_twin(tmp_path / "other", shape, tmp_path)
    with pytest.raises(InputError, match="layers 0: at least 1"):
        write_random_twin(tmp_path / "other", shape, tmp_path / "data", layers=0)

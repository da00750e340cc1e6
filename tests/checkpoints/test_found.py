"""Experts found in a folder by twin-bench init, and what is wrong with a folder, in one line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from twin_bench import cli
from twin_bench.checkpoints.found import find_experts

LORA = {"peft_type": "LORA", "base_model_name_or_path": "org/base", "task_type": "SEQ_CLS"}
CAUSAL = {**LORA, "task_type": "CAUSAL_LM"}
BERT = {"architectures": ["BertForSequenceClassification"]}
LLAMA = {"architectures": ["LlamaForCausalLM"]}


def put(folder: Path, models: dict[str, Any]) -> None:
    """Write each model's config: an adapter's where it is one of PEFT."""
    for name, config in models.items():
        (folder / name).mkdir(parents=True)
        file = "adapter_config.json" if "peft_type" in config else "config.json"
        (folder / name / file).write_text(json.dumps(config))


def test_experts_are_found_one_level_below_and_named_apart(tmp_path: Path) -> None:
    labelled = {**BERT, "id2label": {"1": "yes", "0": "no", "10": "late", "2": "maybe"}}
    put(tmp_path, {"a/best": LORA, "b/best": labelled, "c.1": BERT, "c.1/checkpoint-5": BERT, "twin/model": BERT})
    (tmp_path / "twin" / "twin.json").write_text("{}")
    found = find_experts(tmp_path)
    assert (found.kind, found.base_model) == ("sequence_classification", "org/base")
    assert {expert.name: expert.labels for expert in found.experts} == {
        "a-best": (),
        "b-best": ("no", "yes", "maybe", "late"),
        "c-1": ("LABEL_0", "LABEL_1"),
    }


def test_a_kind_is_taken_alone_where_it_is_asked_for_and_the_base_model_is_no_expert(tmp_path: Path) -> None:
    silent = {**LORA, "task_type": None, "base_model_name_or_path": "/gone/base"}
    put(tmp_path, {"base": LLAMA, "chat": silent, "code": LLAMA, "tox": BERT})
    found = find_experts(tmp_path, kind="causal_lm")
    assert Path(found.base_model) == tmp_path / "base"
    assert [expert.name for expert in found.experts] == ["chat", "code"]
    assert found.left_out == {"tox": "a sequence_classification model"}


@pytest.mark.parametrize(
    ("models", "says"),
    [
        ({}, "no experts; expected folders with adapter_config.json or config.json"),
        ({"base": LLAMA}, "no experts; expected folders"),
        ({"tox": LORA, "chat": CAUSAL}, "experts of two kinds: chat is a causal_lm model and tox a sequence"),
        (
            {"a": LORA, "b": {**LORA, "base_model_name_or_path": "o/x"}},
            "base models: a on org/base, b on o/x",
        ),
        ({"a": BERT}, "no adapter says what its base model is, and no folder is called base; name it: --base-model"),
        ({"a": {**LORA, "base_model_name_or_path": "/x/gone"}}, "the adapters are on /x/gone, which is not there"),
        ({"a": {**LORA, "task_type": None}}, "it has no task_type, and the base model org/base is no folder"),
        ({"tox": LORA}, "no rows of a task: expected"),
    ],
)
def test_what_is_wrong_is_said_in_one_line_and_nothing_is_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], models: dict[str, Any], says: str
) -> None:
    put(tmp_path, models)
    assert cli.main(["init", str(tmp_path)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert says in line
    assert not list(tmp_path.glob("*.yaml"))


def test_nothing_is_overwritten(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "suite.yaml").write_text("mine")
    assert cli.main(["init", str(tmp_path)]) == 2
    assert f"{tmp_path / 'suite.yaml'}: exists already" in capsys.readouterr().err
    assert (tmp_path / "suite.yaml").read_text() == "mine"

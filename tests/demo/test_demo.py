import hashlib
import json
from collections import Counter
from functools import partial
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from tests.support.interpreter import python, side_by_side
from twin_bench.checkpoints.hub import model_directory
from twin_bench.data.glue import GLUE
from twin_bench.data.metrics import score
from twin_bench.demo import BASE_MODEL, TASKS, experts_directory, train, write_data
from twin_bench.demo.sentences import SPLITS, Draw, rows, texts
from twin_bench.demo.train import outputs
from twin_bench.errors import InputError


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("demo")
    write_data(directory)
    return directory


def read(data: Path, task: str, split: str) -> list[dict]:
    return [json.loads(line) for line in (data / task / f"{split}.jsonl").read_text("utf-8").splitlines()]


def digest(directory: Path) -> str:
    total = hashlib.sha256()
    for file in sorted(directory.rglob("*.jsonl")):
        total.update(file.relative_to(directory).as_posix().encode() + b"\0" + file.read_bytes())
    return total.hexdigest()


def test_files_are_the_same_bytes_in_another_process_whatever_its_hash_seed(data, tmp_path):
    code = "import pathlib, sys; from twin_bench.demo import write_data; write_data(pathlib.Path(sys.argv[1]))"
    targets = {hash_seed: tmp_path / hash_seed for hash_seed in ("1", "2")}
    runs = (partial(python, "-c", code, str(target), PYTHONHASHSEED=seed) for seed, target in targets.items())
    assert [done.returncode for done in side_by_side(*runs)] == [0, 0]
    assert [digest(target) for target in targets.values()] == [digest(data)] * 2


def test_the_rows_are_those_that_the_experts_were_trained_on(data):
    # A change to a list or a template in sentences.py changes the rows: then train the experts again
    # (python -m twin_bench.demo.train --out twin_bench/demo/experts) and put the new digest here.
    assert digest(data) == "40d71d06644c1e103ae78d01d2327331e93e1115550106e277809332172576ec"


def test_another_seed_gives_other_rows(data, tmp_path):
    write_data(tmp_path, seed=1)
    assert {file.name for file in tmp_path.rglob("*")} == {file.name for file in data.rglob("*")}  # no temporary left
    for task in TASKS:
        first, other = ({texts(row) for split in SPLITS for row in read(d, task, split)} for d in (data, tmp_path))
        assert len(first & other) < 0.1 * len(first), task


def test_tasks_are_glue_s():
    assert tuple(GLUE) == TASKS


@pytest.mark.parametrize("task", TASKS)
def test_rows_have_glue_s_fields_and_labels_in_range_and_balance(data, task):
    for split, size in SPLITS.items():
        found = read(data, task, split)
        assert len(found) == size
        assert [row["idx"] for row in found] == list(range(size))
        assert all(set(row) == {*GLUE[task].fields, "label", "idx"} for row in found)
        assert all(isinstance(row[field], str) and len(row[field]) > 10 for row in found for field in GLUE[task].fields)
        labels = [row["label"] for row in found]
        if GLUE[task].is_regression:
            assert all(isinstance(label, float) and 0 <= label <= 5 for label in labels)
            assert sum(label < 1.5 for label in labels) > size / 8 < sum(label > 3.5 for label in labels)
        else:
            counts = Counter(labels)
            assert set(counts) == set(range(GLUE[task].num_labels))
            assert min(counts.values()) > 0.7 * size / len(counts)


@pytest.mark.parametrize("task", TASKS)
def test_no_sentence_is_in_two_splits_and_the_order_is_shuffled(data, task):
    splits = {split: {text for row in read(data, task, split) for text in texts(row)} for split in SPLITS}
    assert not splits["train"] & splits["validation"]
    assert not splits["train"] & splits["test"]
    assert not splits["validation"] & splits["test"]
    labels = [row["label"] for row in read(data, task, "train")]
    period = 5 if GLUE[task].is_regression else GLUE[task].num_labels
    assert any(labels[at] != labels[at + period] for at in range(0, 20))


@pytest.mark.parametrize("task", TASKS)
def test_texts_are_clean(data, task):
    for row in read(data, task, "train"):
        for text in texts(row):
            assert text.isascii()
            assert "{" not in text
            assert "  " not in text
            assert text == text.strip()


def test_draws_are_uniform_and_without_replacement():
    draw = Draw("x")
    counts = Counter(draw.one("abcd") for _ in range(4000))
    assert set(counts) == set("abcd")
    assert all(900 < count < 1100 for count in counts.values())
    assert sorted(draw.shuffled(range(10))) == list(range(10))
    assert len(set(draw.some(range(10), 4))) == 4


def test_the_shipped_experts_are_small_and_name_no_machine():
    files = sorted(experts_directory().rglob("*"))
    assert {f.relative_to(experts_directory()).as_posix() for f in files if f.is_file()} == {
        f"{task}/{name}" for task in TASKS for name in ("adapter_config.json", "adapter_model.safetensors")
    }
    assert sum(file.stat().st_size for file in files if file.is_file()) < 8e6
    for task in TASKS:
        text = (experts_directory() / task / "adapter_config.json").read_text("utf-8")
        config = json.loads(text)
        assert config["base_model_name_or_path"] == BASE_MODEL
        assert config["peft_type"] == "LORA"
        assert config["task_type"] == "SEQ_CLS"
        assert not any(isinstance(value, str) and value.startswith(("/", "~")) for value in config.values())


@pytest.mark.parametrize("task", TASKS)
def test_each_expert_loads_on_the_real_encoder_and_beats_the_majority(task):
    directory = model_directory(BASE_MODEL)
    tokenizer = AutoTokenizer.from_pretrained(directory)
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_pretrained(directory, num_labels=GLUE[task].num_labels)
    model = PeftModel.from_pretrained(model, experts_directory() / task)
    chosen = rows(task)["test"][:60]
    logits = outputs(model, tokenizer, chosen)
    answers = logits[:, 0] if GLUE[task].is_regression else logits.argmax(axis=1)
    labels = [float(row["label"]) for row in chosen]
    reached = score(GLUE[task].metric, labels, answers.tolist())
    constant = max(score(GLUE[task].metric, labels, [float(c)] * len(labels)) for c in range(GLUE[task].num_labels))
    assert reached > constant + 10


def test_training_writes_adapters_like_the_shipped_ones(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(train, "EPOCHS", 1)
    monkeypatch.setattr(train, "rows", lambda task: {split: found[:32] for split, found in rows(task).items()})
    assert train.main(["--out", str(tmp_path), "--tasks", "stsb"]) == 0
    assert "stsb" in capsys.readouterr().out
    shipped = experts_directory() / "stsb"
    assert sorted(file.name for file in (tmp_path / "stsb").iterdir()) == sorted(
        file.name for file in shipped.iterdir()
    )
    ours, theirs = (json.loads((d / "adapter_config.json").read_text("utf-8")) for d in (tmp_path / "stsb", shipped))
    assert {**ours, "peft_version": None} == {**theirs, "peft_version": None}
    tensors, expected = (load_file(d / "adapter_model.safetensors") for d in (tmp_path / "stsb", shipped))
    assert {name: tensor.shape for name, tensor in tensors.items()} == {n: t.shape for n, t in expected.items()}
    assert any(tensor.abs().sum() > 0 for name, tensor in tensors.items() if "lora_B" in name)


def test_training_without_the_encoder_is_one_line_and_status_2(tmp_path, monkeypatch, capsys):
    def missing(name):
        raise InputError("no encoder; pip install it")

    monkeypatch.setattr(train, "model_directory", missing)
    assert train.main(["--out", str(tmp_path), "--tasks", "cola"]) == 2
    assert capsys.readouterr().err == "error: no encoder; pip install it\n"

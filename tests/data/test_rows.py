import importlib
import json
import os
from pathlib import Path

import pytest

from twin_bench.data.classification import Classification
from twin_bench.data.generative import GENERATIVE
from twin_bench.data.glue import GLUE
from twin_bench.data.rows import read_router_rows, read_rows, split_path
from twin_bench.data.task import TaskInput, joined
from twin_bench.errors import LONGEST, InputError


def write(path, *rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{row if isinstance(row, str) else json.dumps(row)}\n" for row in rows))
    return path


def test_rows_come_in_order_with_other_fields_kept(tmp_path):
    rows = [{"sentence": "Née\u2028là", "label": 1, "idx": 7}, {"sentence": "", "label": 0, "more": None}]
    assert read_rows(write(tmp_path / "r.jsonl", rows[0], "", rows[1]), GLUE["cola"]) == rows


def test_unescaped_line_separator_does_not_end_a_line(tmp_path):
    path = tmp_path / "r.jsonl"
    path.write_text('{"sentence": "a\u2028b", "label": 1}\n', encoding="utf-8")
    assert read_rows(path, GLUE["cola"]) == [{"sentence": "a\u2028b", "label": 1}]


GOOD = {"sentence": "x", "label": 1}


@pytest.mark.parametrize(
    ("bad", "says"),
    [
        ("{", "not JSON"),
        ("[1]", "expected a JSON object"),
        ({"sentense": "x", "label": 1}, "no field 'sentence'; did you mean 'sentense'?"),
        ({"sentence": 3, "label": 1}, "field 'sentence' is not a text but 3"),
        ({"sentence": "x"}, "no field 'label'; known: sentence; cola needs one of: 0 unacceptable, 1 acceptable"),
        ({"sentence": "x", "label": 2}, "label 2; cola"),
        ({"sentence": "x", "label": -1}, "label -1; cola"),
        ({"sentence": "x", "label": 1.0}, "label 1.0; cola"),
        ({"sentence": "x", "label": True}, "label True; cola"),
        ({"sentence": "x", "label": "1"}, "label '1'; cola"),
        ({"sentence": "x", "label": float("nan")}, "label nan; cola"),
        ({"sentence": None, "label": 1}, "field 'sentence' is not a text but None"),
        ('{"sentence": "x", "label": 0, "label": 1}', "the field 'label' stands twice; remove one"),
        ('{"sentence": "half \\ud83d", "label": 1}', "an escape \\ud... that is half of a character"),
        ('{"sentence": "x", "label": 1' + "0" * 5000 + "}", "not JSON (Exceeds the limit"),
        ("[" * 100_000, "nested too deeply"),
        ({"sentence": ["\x1b[31m"], "label": 1}, r"is not a text but ['\x1b[31m']"),
    ],
)
def test_a_bad_row_is_named_by_file_and_line(tmp_path, bad, says):
    path = write(tmp_path / "r.jsonl", GOOD, "", bad)
    with pytest.raises(InputError) as error:
        read_rows(path, GLUE["cola"])
    assert str(error.value).startswith(f"{path}, line 3: ")
    assert says in str(error.value)
    assert "\n" not in str(error.value)


def test_pairs_of_escapes_are_characters(tmp_path):
    path = write(tmp_path / "r.jsonl", '{"sentence": "\\uD83D\\ude00 \\\\ud83d", "label": 1}')
    assert read_rows(path, GLUE["cola"]) == [{"sentence": "\U0001f600 \\ud83d", "label": 1}]


@pytest.mark.parametrize("bad", [{"sentence": "x", "label": "y" * 50_000_000}, {"x" * 50_000_000: "x", "label": 1}])
def test_a_line_of_50_megabytes_is_shown_in_short(tmp_path, bad):
    with pytest.raises(InputError) as error:
        read_rows(write(tmp_path / "r.jsonl", bad), GLUE["cola"])
    assert "r.jsonl, line 1: " in str(error.value)
    assert len(str(error.value)) <= LONGEST


@pytest.mark.parametrize(
    ("task", "row"),
    [
        ("mmlu", {"question": "q", "choices": "abcd", "answer": 1, "subject": "s"}),
        ("mmlu", {"question": "q", "choices": ["a", "b"], "answer": True, "subject": "s"}),
        ("mmlu", {"question": "q", "choices": ["a", None], "answer": 1, "subject": "s"}),
        ("mmlu", {"question": "q", "choices": ["a", "b"], "answer": 2, "subject": "s"}),
        ("truthfulqa", {"question": "q", "mc1_targets": {"choices": "ab", "labels": [1, 0]}}),
        ("truthfulqa", {"question": "q", "mc1_targets": {"choices": ["a", "b"], "labels": [1, 0, 0]}}),
        ("truthfulqa", {"question": "q", "mc1_targets": [1]}),
        ("cnn_dailymail", {"article": None, "highlights": "x"}),
    ],
)
def test_a_bad_row_of_a_generative_task(tmp_path, task, row):
    with pytest.raises(InputError, match=rf"r\.jsonl, line 1: not a row of {task} \("):
        read_rows(write(tmp_path / "r.jsonl", row), GENERATIVE[task])


@pytest.mark.parametrize("label", [None, "2.5", True, float("nan"), float("inf"), 1e200, 10**400])
def test_a_regression_label_is_a_finite_number(label):
    row = {"sentence1": "a", "sentence2": "b", "label": label}
    with pytest.raises(InputError, match=r"here: label .*; stsb needs a number"):
        GLUE["stsb"].check(row, "here")
    for good in (0, 2.5, -1):
        GLUE["stsb"].check(row | {"label": good}, "here")


def test_true_and_false_are_the_labels_that_say_so():
    """The names decide and not the order: true is never the label that says no."""
    for labels, ids in ((("no", "yes"), (0, 1)), (("True", "False"), (1, 0)), ((0, 1), (0, 1))):
        task = Classification("mine", ("text",), "acc", labels=labels)
        found = tuple(task.target({"text": "a", "label": value}) for value in (False, True))
        assert found == ids, labels
    for labels in (("good", "bad"), ("no", "yes", "maybe"), ("yes", "true")):
        with pytest.raises(InputError, match=r"row: label (True|true); mine needs one of: 0 "):
            Classification("mine", ("text",), "acc", labels=labels).target({"text": "a", "label": True})


def test_what_is_wrong_with_a_file(tmp_path):
    with pytest.raises(InputError, match=r"none\.jsonl: no such file; .*DATA/TASK/SPLIT\.jsonl"):
        read_rows(tmp_path / "none.jsonl", GLUE["cola"])
    with pytest.raises(InputError, match=r"r\.jsonl: empty"):
        read_rows(write(tmp_path / "r.jsonl", "", " "), GLUE["cola"])
    with pytest.raises(InputError, match="cannot be read"):
        read_rows(tmp_path, GLUE["cola"])
    (tmp_path / "latin.jsonl").write_bytes(b'\n{"sentence": "\xe9", "label": 1}')
    with pytest.raises(InputError, match=r"latin\.jsonl, line 2: cannot be read as UTF-8"):
        read_rows(tmp_path / "latin.jsonl", GLUE["cola"])


def test_text_pair_takes_the_tasks_fields_in_order():
    row = {"question": "q", "sentence": "s", "label": 0}
    assert GLUE["qnli"].texts(row) == ("q", "s")
    assert GLUE["sst2"].texts(row) == ("s", None)
    assert joined("q", "s") == "q\ns"
    assert joined("s", None) == "s"


@pytest.mark.parametrize("split", ["../x", "a/b", "", ".", "train.jsonl"])
def test_a_split_is_a_name_and_never_a_path(split):
    assert split_path(Path("d"), "cola", "validation_matched") == Path("d/cola/validation_matched.jsonl")
    with pytest.raises(InputError, match="split"):
        split_path(Path("d"), "cola", split)


def test_router_rows_of_a_directory_in_the_glue_schema(tmp_path):
    write(tmp_path / "cola/train.jsonl", {"sentence": "x"})  # no label: it is not needed
    write(tmp_path / "rte/train.jsonl", {"sentence1": "a", "sentence2": "b", "label": 0})
    write(tmp_path / "sst2/train.jsonl", "nonsense of a task that is not asked for")
    rows = read_router_rows(tmp_path, ["rte", "cola"])
    assert rows.train == [TaskInput("a", "b", "rte"), TaskInput("x", None, "cola")]
    with pytest.raises(InputError, match="no router rows for mnli, my_task; every expert needs some"):
        read_router_rows(tmp_path, ["cola", "mnli", "my_task"])


def test_router_rows_of_known_tasks_and_of_others_beside_them(tmp_path):
    write(tmp_path / "cola/train.jsonl", {"sentence": "x", "label": 1})
    file = write(tmp_path / "law/train.jsonl", {"text": "y", "text_pair": "z"}, {"text": "v", "task": "law"})
    rows = [TaskInput("y", "z", "law"), TaskInput("v", None, "law"), TaskInput("x", None, "cola")]
    assert read_router_rows(tmp_path, ["law", "cola"]).train == rows
    assert read_router_rows(tmp_path, ["law"]).train == rows[:2]
    write(file, {"text": "v", "task": "cola"})
    with pytest.raises(InputError, match=r"law/train.jsonl, line 1: task 'cola' in the rows of expert 'law'; move or"):
        read_router_rows(tmp_path, ["law", "cola"])
    write(file, {"sentence": "v"})
    with pytest.raises(InputError, match=r"law/train.jsonl, line 1: no field 'text'"):
        read_router_rows(tmp_path, ["law"])


def test_router_rows_of_a_file_or_of_a_directory_of_files(tmp_path):
    first = write(tmp_path / "1.jsonl", {"text": "x", "task": "law"}, {"text": "y", "text_pair": "z", "task": "code"})
    write(tmp_path / "2.jsonl", {"text": "v", "text_pair": None, "task": "law"})
    rows = [TaskInput("x", None, "law"), TaskInput("y", "z", "code"), TaskInput("v", None, "law")]
    assert read_router_rows(first, ["code", "law"]).train == rows[:2]
    assert read_router_rows(tmp_path, ["code", "law"]).train == rows


@pytest.mark.parametrize(
    ("bad", "says"),
    [
        ({"text": "x", "task": "lav"}, "line 2: no expert is named 'lav'; did you mean 'law'?"),
        ({"text": "x"}, "line 2: no field 'task'"),
        ({"task": "law"}, "line 2: no field 'text'"),
        ({"text": "x", "text_pair": 1, "task": "law"}, "line 2: field 'text_pair' is not a text but 1"),
    ],
)
def test_a_bad_router_row_is_named_by_file_and_line(tmp_path, bad, says):
    path = write(tmp_path / "r.jsonl", {"text": "x", "task": "law"}, bad)
    with pytest.raises(InputError) as error:
        read_router_rows(path, ["law"])
    assert says in str(error.value)


def test_a_directory_without_router_rows_says_what_belongs_there(tmp_path):
    with pytest.raises(InputError, match=r"no router rows; put \{task\}/train.jsonl"):
        read_router_rows(tmp_path, ["cola"])


@pytest.mark.real
@pytest.mark.skipif("TWIN_BENCH_DATA" not in os.environ, reason="needs TWIN_BENCH_DATA")
@pytest.mark.parametrize("task", GLUE.values(), ids=GLUE)
def test_real_rows(task):
    data = Path(os.environ["TWIN_BENCH_DATA"])
    rows = read_rows(split_path(data, task.name), task)
    assert len(rows) >= 250
    assert len({row["label"] for row in rows}) >= task.num_labels
    assert all(text and (pair is None) == (len(task.fields) == 1) for text, pair in (task.texts(r) for r in rows))
    router_rows = read_router_rows(data, [task.name]).train
    assert len(router_rows) == len(read_rows(split_path(data, task.name, "train"), task))


def test_the_code_of_a_plugins_kind_of_task_stands_in_its_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "my_kind_of_task.py"
    file.write_text("from twin_bench.data.classification import Classification\nclass Mine(Classification): pass\n")
    monkeypatch.syspath_prepend(tmp_path)
    task = importlib.import_module("my_kind_of_task").Mine("mine", ("text",), "acc", ("no", "yes"))
    before = task.identity
    file.write_text(file.read_text() + "# changed\n")
    assert task.identity != before

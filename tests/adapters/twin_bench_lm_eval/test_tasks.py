import json
import os
from pathlib import Path

import lm_eval
import pytest
from lm_eval.tasks import TaskManager

from twin_bench.data.glue import GLUE
from twin_bench.data.metrics import score, standard_error
from twin_bench.data.rows import read_rows, split_path
from twin_bench.errors import InputError
from twin_bench.paths import tasks_directory

TASKS = {name: f"twin_{name}" for name in GLUE}


def evaluate(model, tasks=("twin_glue",), metadata=None, **options):
    manager = TaskManager(include_path=str(tasks_directory()), include_defaults=False, metadata=metadata)
    return lm_eval.simple_evaluate(model, tasks=list(tasks), task_manager=manager, **options)


def predicted(twin, rows, task):
    answers = [twin.answer(*task.texts(row), task.name).logits for row in rows]
    return [float(logits[0]) if task.is_regression else int(logits.argmax()) for logits in answers]


def test_every_task_has_its_score_and_its_standard_error(served, fake_twin, data):
    results = evaluate(served(fake_twin), metadata={"data": str(data)})
    assert set(results["results"]) == set(TASKS.values())  # and no mean of unlike metrics
    for name, task in GLUE.items():
        rows = read_rows(split_path(data, name), task)
        references, predictions = [row["label"] for row in rows], predicted(fake_twin, rows, task)
        cell = results["results"][TASKS[name]]
        assert cell[f"{task.metric},none"] == pytest.approx(score(task.metric, references, predictions) / 100)
        expected = standard_error(task.metric, references, predictions) / 100
        assert cell[f"{task.metric}_stderr,none"] == pytest.approx(expected)
        assert expected > 0
        assert cell["sample_len"] == len(rows) == results["n-samples"][TASKS[name]]["effective"]
        assert {key for key in cell if "," in key} - {f"{task.metric}_stderr_stderr,none"} == {
            f"{task.metric},none",
            f"{task.metric}_stderr,none",
        }
    assert len(fake_twin.calls) == 2  # the labels of seven tasks, the numbers of one
    assert results["config"]["protocol"] == "standard"
    assert results["config"]["digests"] == fake_twin.digests


def test_lm_evals_table_shows_the_standard_error_beside_the_score(served, data):
    from lm_eval.utils import make_table

    results = evaluate(served(), ["twin_cola"], {"data": str(data)})
    cell = results["results"]["twin_cola"]
    (line,) = [line for line in make_table(results).splitlines() if "twin_cola" in line]
    shown = [column.strip() for column in line.split("|")]
    assert float(shown[shown.index("↑") + 1]) == pytest.approx(cell["mcc,none"], abs=1e-4)
    assert float(shown[shown.index("±") + 1]) == pytest.approx(cell["mcc_stderr,none"], abs=1e-4)
    assert "mcc_stderr" not in make_table(results)


def test_samples_show_the_raw_text(served, data):
    samples = evaluate(served(), ["twin_rte", "twin_cola"], {"data": str(data)})["samples"]
    for name in ("rte", "cola"):
        rows = read_rows(split_path(data, name), GLUE[name])
        for sample, row in zip(samples[TASKS[name]], rows, strict=True):
            texts = [row[field] for field in GLUE[name].fields]
            assert [arguments[0] for arguments in sample["arguments"]] == ["\n".join(texts)] * 2
            assert [arguments[1] for arguments in sample["arguments"]] == [" 0", " 1"]
            assert sample["doc"] == {
                "text": texts[0],
                "text_pair": texts[1] if len(texts) == 2 else None,
                "label": row["label"],
                "task": name,
                "idx": row["idx"],
            }
            assert sample["target"] == row["label"]


def test_a_text_of_digits_stays_a_text(served, fake_twin, tmp_path):
    (tmp_path / "cola").mkdir()
    rows = [
        {"sentence": "1999", "label": 1},
        {"sentence": "[1]", "label": 0},
        {"sentence": " x ", "label": 0},
    ]
    (tmp_path / "cola" / "validation.jsonl").write_text("\n".join(map(json.dumps, rows)))
    evaluate(served(fake_twin), ["twin_cola"], {"data": str(tmp_path)})
    assert {text for text, _, _ in fake_twin.calls[0]} == {"1999", "[1]", " x "}


def test_limit_and_split(served, data):
    results = evaluate(served(), ["twin_mnli", "twin_stsb"], {"data": str(data)}, limit=5)
    assert [results["n-samples"][name]["effective"] for name in ("twin_mnli", "twin_stsb")] == [5, 5]
    results = evaluate(served(), ["twin_mnli"], {"data": str(data), "split": "train"})
    assert results["n-samples"]["twin_mnli"] == {"original": 10, "effective": 10}


def test_rows_come_from_twin_bench_data_where_no_argument_names_them(served, data, monkeypatch):
    monkeypatch.setenv("TWIN_BENCH_DATA", str(data))
    assert evaluate(served(), ["twin_sst2"])["n-samples"]["twin_sst2"]["original"] == 40
    with pytest.raises(InputError, match=r"elsewhere/sst2/validation\.jsonl: no such file"):
        evaluate(served(), ["twin_sst2"], {"data": "elsewhere"})


def test_an_unreachable_hub_says_what_to_set(served, monkeypatch):
    monkeypatch.delenv("TWIN_BENCH_DATA", raising=False)

    def load_dataset(path, name, split):
        assert (path, name, split) == ("nyu-mll/glue", "mnli", "validation_matched")
        raise ConnectionError("Couldn't reach it\nand more")

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    with pytest.raises(InputError, match=r"^mnli: .*\(Couldn't reach it\); run again, .*TWIN_BENCH_DATA"):
        evaluate(served(), ["twin_mnli"])


def test_rows_of_the_hub_are_read_like_those_of_a_file(served, monkeypatch):
    from datasets import Dataset

    monkeypatch.delenv("TWIN_BENCH_DATA", raising=False)
    rows = [{"sentence": f"t {n}", "label": n % 2, "idx": n} for n in range(6)]
    monkeypatch.setattr("datasets.load_dataset", lambda path, name, split: Dataset.from_list(rows))
    assert evaluate(served(), ["twin_cola"])["n-samples"]["twin_cola"]["original"] == 6
    rows[3]["label"] = -1  # the hub's test rows
    with pytest.raises(InputError, match="nyu-mll/glue cola, row 3: label -1"):
        evaluate(served(), ["twin_cola"])


def test_a_wrong_head_without_labels_is_wrong_and_not_label_0(served, data, fake_twin):
    fake_twin.protocol = "routed"
    fake_twin.expert_names = ("stsb",)
    results = evaluate(served(fake_twin), ["twin_sst2"], {"data": str(data)})
    assert results["results"]["twin_sst2"]["acc,none"] == 0


@pytest.mark.parametrize("changes", [{"system_instruction": "Answer well."}])
def test_what_would_change_the_text_is_refused(served, data, changes):
    with pytest.raises(InputError, match="reads the row's own text and nothing else"):
        evaluate(served(), ["twin_cola"], {"data": str(data)}, **changes)


def test_examples_are_never_added(served, data):
    results = evaluate(served(), ["twin_cola"], {"data": str(data)}, num_fewshot=3)
    assert results["n-shot"]["twin_cola"] == 0


def test_use_cache_is_refused(served, data, tmp_path):
    with pytest.raises(InputError, match="--use_cache"):
        evaluate(served(), ["twin_cola"], {"data": str(data)}, use_cache=str(tmp_path / "cache"))


@pytest.mark.real
@pytest.mark.skipif("TWIN_BENCH_DATA" not in os.environ, reason="needs TWIN_BENCH_DATA")
def test_all_eight_tasks_on_real_rows(served, fake_twin):
    results = evaluate(served(fake_twin))
    for name, task in GLUE.items():
        rows = read_rows(split_path(Path(os.environ["TWIN_BENCH_DATA"]), name), task)
        references, predictions = [row["label"] for row in rows], predicted(fake_twin, rows, task)
        cell = results["results"][TASKS[name]]
        assert cell["sample_len"] == len(rows)
        assert cell[f"{task.metric},none"] == pytest.approx(score(task.metric, references, predictions) / 100)
        assert 0 < cell[f"{task.metric}_stderr,none"] < 0.1

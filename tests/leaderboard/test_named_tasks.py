"""lm-eval's tasks by their names: a user's own task files, groups, filters, tasks that are nobody's."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import lm_eval
import pytest
import yaml
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from tests.support.families import Family
from tests.support.models import WORDS
from tests.support.suites import rows_of, run
from tests.support.task_files import CHOICE, TEXT, loaded, own_task
from twin_bench.data.named import NamedTask
from twin_bench.errors import InputError
from twin_bench_lm_eval.named import code_digest, described, prompts, rows_digest

SPLITS = {"train": 9, "test": 7}
TASKS: dict[str, dict[str, Any]] = {
    "capitals": {**CHOICE, "training_split": "train", "fewshot_split": "train", "num_fewshot": 2},
    "rivers": {**CHOICE, "fewshot_split": "train", "num_fewshot": 1},
    "letters": {**TEXT, "fewshot_split": "train"},
    "tests_alone": CHOICE,
    "tagged": {**CHOICE, "tag": "a_tag"},
    "prose": {
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "question",
        "metric_list": [{"metric": "word_perplexity"}, {"metric": "bits_per_byte"}],
    },
}


@pytest.fixture(scope="module")
def include_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder of task files, as a user has it, with the rows beside them."""
    folder = tmp_path_factory.mktemp("my-tasks")
    draw = random.Random(0)
    for name, config in TASKS.items():
        files = {}
        for split, size in {**SPLITS, **({"train": 0} if name == "tests_alone" else {})}.items():
            rows = [
                {"question": " ".join(draw.choices(WORDS, k=6)), "options": ["A", "B", "C"], "answer": number % 3}
                for number in range(size)
            ]
            if rows:
                files[split] = str(folder / f"{name}-{split}.jsonl")
                Path(files[split]).write_text("".join(json.dumps(row) + "\n" for row in rows))
        own = {"task": name, "dataset_path": "json", "dataset_kwargs": {"data_files": files}, "test_split": "test"}
        (folder / f"{name}.yaml").write_text(yaml.safe_dump({**own, **config}))
    group = {"group": "trivia", "task": ["capitals", "rivers"], "aggregate_metric_list": [{"metric": "acc"}]}
    (folder / "trivia.yaml").write_text(yaml.safe_dump(group))
    return folder


@pytest.fixture(scope="module")
def suite(wide_llama: Family, include_path: Path) -> dict[str, Any]:
    experts = wide_llama.recipe["experts"]
    return {
        "name": "named",
        "base_model": wide_llama.recipe["base_model"],
        "experts": {"math": experts["mmlu"], "code": experts["bbq"]},
        "tasks": {
            "capitals": {"expert": "math"},
            "rivers": {"expert": "math", "metric": "acc_norm", "few_shot": 3},
            "letters": {"expert": "code", "metric": "exact_match,first"},
            "prose": {"expert": None, "metric": "bits_per_byte"},
            "trivia": {"expert": "code"},
        },
        "include_path": str(include_path),
        "batch_size": 3,
        "methods": ["average", {"twin": {"router": {"epochs": 3}}}, "emr", {"fisher": {"floor": 1e-6}}],
        "calibration_rows": 4,
    }


@pytest.fixture(scope="module")
def board(suite: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("board")
    assert run(suite, folder) == 0
    return folder / "out", rows_of(folder)


def test_every_cell_is_there_and_nobodys_task_is_read_against_the_base_model(board: Any, suite: dict[str, Any]) -> None:
    out, rows = board
    owned = {task for task, given in suite["tasks"].items() if given["expert"]}
    expected = {("standard", method, task) for method in ("experts", "constant", "emr") for task in owned}
    expected |= {("standard", m, task) for m in ("pretrained", "average", "twin", "fisher") for task in suite["tasks"]}
    assert rows.keys() == expected
    for (_, method, task), row in rows.items():
        assert row["expert"] == suite["tasks"][task]["expert"]
        assert row["n"] == (14 if task == "trivia" else 7)
        if task == "prose":
            assert row["normalized"] is None
            base = rows["standard", "pretrained", task]["score"]
            assert row["retention"] == pytest.approx(100 * base / row["score"])  # less is better
            assert 0 < row["stderr"] < row["score"]
        else:
            assert row["retention"] is None
            best = rows["standard", "experts", task]["score"]
            assert row["normalized"] == (pytest.approx(100 * row["score"] / best) if best > 0 else None), method
    said = (out / "leaderboard.md").read_text()
    assert "No expert was trained for prose." in said
    assert "Less is better on prose (bits_per_byte,none)" in said


def test_an_expert_scores_what_lm_evals_own_model_scores(
    board: Any, suite: dict[str, Any], wide_llama: Family, include_path: Path
) -> None:
    _, rows = board
    manager = TaskManager(include_path=str(include_path), include_defaults=False)
    for task, given in suite["tasks"].items():
        model = suite["experts"].get(given["expert"], suite["base_model"])
        results = lm_eval.simple_evaluate(
            HFLM(model, device="cpu", batch_size=3),
            tasks=[task],
            num_fewshot=given.get("few_shot"),
            task_manager=manager,
            bootstrap_iters=1,
        )["results"][task]
        row = rows["standard", "experts" if given["expert"] else "pretrained", task]
        metric, _, kind = row["metric"].partition(",")
        unit = 1 if task == "prose" else 100
        assert row["score"] == pytest.approx(unit * results[f"{metric},{kind}"], rel=1e-5)
        if task != "prose":
            assert row["stderr"] == pytest.approx(unit * results[f"{metric}_stderr,{kind}"], rel=1e-5)


def test_routers_read_training_rows_as_the_prompts_that_are_scored(board: Any) -> None:
    out, rows = board
    data = out / "data" / "lm-eval"
    trained = [json.loads(line) for line in (data / "capitals" / "train.jsonl").read_text().splitlines()]
    assert len(trained) == SPLITS["train"]
    assert all(row["text"].count(" :") == 3 and row["answer"] in "ABC" for row in trained)  # two examples
    assert len((data / "trivia" / "train.jsonl").read_text().splitlines()) == 2 * SPLITS["train"]
    router = rows["standard", "twin", "capitals"]["notes"]["router"]
    assert router["selected_on"] == "held-out training rows"
    assert rows["standard", "fisher", "letters"]["notes"]["calibration"]["rows"] == {"math": 4, "code": 4}


def test_prompts_are_those_that_lm_eval_asks(suite: dict[str, Any], include_path: Path) -> None:
    found, model = loaded(include_path, "capitals"), HFLM(suite["base_model"], device="cpu", batch_size=3)
    samples = lm_eval.simple_evaluate(model, tasks=[found.tasks["capitals"]])["samples"]["capitals"]
    asked = {sample["doc_id"]: sample["arguments"][0][0] for sample in samples}
    drawn = [[row["text"] for row in prompts(found, scored=True)] for _ in range(2)]
    assert drawn == 2 * [[asked[number] for number in sorted(asked)]]


def test_an_encoder_decoders_expert_scores_what_lm_evals_own_model_scores(
    suite: dict[str, Any], seq2seq_families: Any, include_path: Path, tmp_path: Path
) -> None:
    experts = seq2seq_families("t5").recipe["experts"]
    tasks = {name: suite["tasks"][name] for name in ("capitals", "letters")}
    changed = {
        **suite,
        "base_model": seq2seq_families("t5").recipe["base_model"],
        "experts": {"math": experts["mmlu"], "code": experts["bbq"]},
        "tasks": tasks,
        "methods": [{"twin": {"router": {"epochs": 2}}}, "ties"],
    }
    assert run(changed, tmp_path) == 0
    rows, manager = rows_of(tmp_path), TaskManager(include_path=str(include_path), include_defaults=False)
    assert len(rows) == 5 * len(tasks)
    for task, given in tasks.items():
        model = HFLM(changed["experts"][given["expert"]], backend="seq2seq", device="cpu", batch_size=1)
        results = lm_eval.simple_evaluate(model, tasks=[task], task_manager=manager, bootstrap_iters=0)
        row = rows["standard", "experts", task]
        assert row["score"] == pytest.approx(100 * results["results"][task][row["metric"]])


def test_scored_prompts_are_written_for_the_paper_protocol_alone(suite: dict[str, Any], tmp_path: Path) -> None:
    changed = {**suite, "tasks": {"capitals": {"expert": "math"}}, "experts": {"math": suite["experts"]["math"]}}
    changed["methods"] = [{"twin": {"router": {"epochs": 2}, "protocol": "standard"}}]
    folder = tmp_path / "out" / "data" / "lm-eval" / "capitals"
    assert run(changed, tmp_path) == 0
    before = rows_of(tmp_path)["standard", "twin", "capitals"]["key"]
    assert [file.name for file in folder.iterdir()] == ["train.jsonl"]
    assert run({**changed, "protocol": ["standard", "paper"]}, tmp_path) == 0
    assert len((folder / "validation.jsonl").read_text().splitlines()) == SPLITS["test"]
    assert rows_of(tmp_path)["standard", "twin", "capitals"]["key"] == before


@pytest.mark.parametrize(
    ("tasks", "says"),
    [
        ({"capital": {"expert": "math"}}, "unknown task 'capital'; did you mean 'capitals'"),
        ({"capitals": {"expert": "math", "metric": "f1"}}, "no metric 'f1'; it has: acc,none, acc_norm,none"),
        ({"letters": {"expert": "code", "metric": "exact_match,last"}}, "it has: exact_match,whole, exact_match,first"),
        ({"capitals": {"expert": "math", "split": "dev"}}, "task 'capitals': no split 'dev'"),
        ({"a_tag": {"expert": "math"}}, "task 'a_tag' is a tag of lm-eval's, which has no score of its own"),
        ({"capitals": {"expert": "maths"}}, "no expert is named 'maths'; did you mean 'math'"),
        ({"tests_alone": {"expert": "math"}}, "for expert 'math': tests_alone has no rows but those that are scored"),
        ({"capitals": {"expert": "math", "helm": "mmlu:subject=anatomy"}}, "it is HELM's: --harness helm"),
        ({"prose": {"expert": None, "text": "question"}}, "expert: null, but a classifier's answer"),
    ],
)
def test_what_is_wrong_with_a_task_is_said_before_the_first_cell(
    suite: dict[str, Any],
    include_path: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    tasks: dict[str, Any],
    says: str,
) -> None:
    assert run({**suite, "tasks": tasks, "methods": ["twin"]}, tmp_path) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error")]
    assert says in line
    assert not list((tmp_path / "out").rglob("cells*"))


def test_another_weighting_of_a_group_is_scored_again(
    suite: dict[str, Any], include_path: Path, tmp_path: Path
) -> None:
    keys = []
    for weighted in (True, False):
        aggregated = [{"metric": "acc", "weight_by_size": weighted}]
        group = {"group": "weighted", "task": ["capitals", "tests_alone"], "aggregate_metric_list": aggregated}
        (include_path / "weighted.yaml").write_text(yaml.safe_dump(group))
        assert run({**suite, "tasks": {"weighted": {"expert": "math"}}, "methods": []}, tmp_path) == 0
        keys.append(rows_of(tmp_path)["standard", "experts", "weighted"]["key"])
    assert keys[0] != keys[1]


@pytest.mark.parametrize(
    ("metric", "percent"),
    [
        *[("rougeL_acc,none", True), ("rougeL_max,none", False), ("rouge_2", True), ("bleu_acc,none", True)],
        *[
            ("pass@1,create_test", True),
            ("prompt_level_strict_acc,none", True),
            ("spearman,none", True),
            ("score", False),
        ],
    ],
)
def test_which_scores_are_fractions(metric: str, percent: bool) -> None:
    assert NamedTask("any").scored_by(metric).percent is percent


@pytest.mark.parametrize(
    ("splits", "settings", "trained"),
    [
        ({"training_split": "train", "fewshot_split": "test"}, {}, "train"),
        ({"training_split": "train", "validation_split": "dev", "fewshot_split": "train"}, {"split": "train"}, "dev"),
        ({"training_split": "train", "validation_split": "dev"}, {"split": "train"}, "dev"),
        ({"training_split": "test"}, {}, None),
        ({"validation_split": "dev", "fewshot_split": "dev"}, {}, "dev"),
    ],
)
def test_training_prompts_hold_no_row_that_is_scored(
    tmp_path: Path, splits: dict[str, str], settings: dict[str, str], trained: str | None
) -> None:
    own_task(tmp_path, "own", {**CHOICE, **splits, "num_fewshot": 2})
    texts = [row["text"] for row in prompts(loaded(tmp_path, "own", **settings), scored=False)]
    assert len(texts) == {"train": 9, "dev": 4, None: 0}[trained]
    named = {word for text in texts for word in text.split() if word in ("train", "dev", "test")}
    assert named == ({trained} if trained else set())
    shown = 2 if trained and splits.get("fewshot_split") == trained else 0
    assert all(text.count(" :") == 1 + shown for text in texts)


def test_what_is_changed_beside_a_task_changes_its_digest(tmp_path: Path) -> None:
    """A helper that a scoring function calls, and the training rows, stand in no config of lm-eval's."""
    own_task(tmp_path, "own", {**CHOICE, "training_split": "train", "fewshot_split": "dev"})
    (tmp_path / "helpers.py").write_text("def inner(): return 0.0\n")

    def now() -> str:
        return rows_digest(loaded(tmp_path, "own"), code_digest(str(tmp_path)))

    first = now()
    assert now() == first
    (tmp_path / "helpers.py").write_text("def inner(): return 1.0\n")
    second = now()
    assert second != first
    rows = tmp_path / "own-train.jsonl"
    rows.write_text(rows.read_text().replace("train 3", "changed"))
    assert now() != second


def test_a_training_row_that_the_task_cannot_read_is_named(tmp_path: Path) -> None:
    own_task(tmp_path, "own", {**CHOICE, "training_split": "train"})
    rows = tmp_path / "own-train.jsonl"
    lines = rows.read_text().splitlines()
    for wrong in (7, -1):
        rows.write_text("\n".join([*lines[:2], lines[2].replace('"answer": 1', f'"answer": {wrong}'), *lines[3:]]))
        with pytest.raises(InputError, match=f"'own': training document 2: .*the right option is {wrong} of 0 to 2"):
            list(prompts(loaded(tmp_path, "own"), scored=False))


FUNCTIONS = """
def process(doc, results): return {"acc": 1.0, "points": 1.0, "gone": 1.0}
def hundred(values): return 57.0
def nothing(values): return float("nan")
def named(*given, **kept): return {"hits": 1.0}
"""


def test_a_score_that_a_table_cannot_show_is_refused(
    suite: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A score of 57 whose name says that it is a fraction would be 5,700 points."""
    (tmp_path / "functions.py").write_text(FUNCTIONS)
    metrics = {"acc": "hundred", "points": "hundred", "gone": "nothing"}
    listed = [{"metric": m, "aggregation": f"!function functions.{f}"} for m, f in metrics.items()]
    listed = [{**one, "higher_is_better": True} for one in listed]
    own_task(tmp_path, "own", {**TEXT, "process_results": "!function functions.process", "metric_list": listed})

    def scored(metric: str) -> int:
        tasks = {"own": {"expert": "math", "metric": metric}}
        return run({**suite, "include_path": str(tmp_path), "tasks": tasks, "methods": []}, tmp_path)

    for metric, says in (
        ("acc", "task 'own': acc,whole is 57, and a score of this name is read as a fraction"),
        ("gone", "own: gone,whole is nan"),
    ):
        assert scored(metric) == 2
        assert says in capsys.readouterr().err
        assert not list((tmp_path / "out").rglob("cells*/**/*.json"))
    assert scored("points") == 0
    assert rows_of(tmp_path)["standard", "experts", "own"]["score"] == 57


def test_a_task_whose_function_names_its_scores_needs_one_with_its_filter(tmp_path: Path) -> None:
    (tmp_path / "functions.py").write_text(FUNCTIONS)
    own_task(tmp_path, "own", {**TEXT, "metric_list": [{"metric": "!function functions.named", "aggregation": "mean"}]})

    def metric_of(metric: str) -> str:
        given = loaded(tmp_path, "own")
        return described(NamedTask("own", metric=metric), given).metric

    assert metric_of("hits") == "hits,whole"
    assert metric_of("hits,first") == "hits,first"
    with pytest.raises(InputError, match="task 'own': give metric: a function of the task's own names its scores"):
        metric_of("")
    with pytest.raises(InputError, match="no metric 'hits,last'; its filters: first, whole"):
        metric_of("hits,last")


@pytest.mark.parametrize(
    ("config", "shots", "says"),
    [
        ({**CHOICE, "fewshot_split": "train"}, 10, "few_shot 10; own has 9 examples"),
        ({**CHOICE, "fewshot_split": "test"}, 7, "few_shot 7; own has 6 examples"),
        (TASKS["prose"], 2, "few_shot 2; own scores whole texts, without examples"),
    ],
)
def test_more_examples_than_there_are_is_said_at_once(
    tmp_path: Path, config: dict[str, Any], shots: int, says: str
) -> None:
    own_task(tmp_path, "own", config)
    with pytest.raises(InputError, match=f"task 'own': {says}"):
        loaded(tmp_path, "own", few_shot=shots)
    if config is not TASKS["prose"]:
        assert list(prompts(loaded(tmp_path, "own", few_shot=shots - 1), scored=True))


def test_whole_texts_are_no_training_prompts(tmp_path: Path) -> None:
    own_task(tmp_path, "own", {**TASKS["prose"], "training_split": "train"})
    assert not list(prompts(loaded(tmp_path, "own"), scored=False))

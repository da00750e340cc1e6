"""lm-eval as a harness of the leaderboard: a cell's score is that of simple_evaluate, and no process is started."""

import subprocess
from types import SimpleNamespace

import pytest
from lm_eval import simple_evaluate
from lm_eval.tasks import TaskManager

from tests.support.rows import task_rows, write_generative_rows, write_rows
from twin_bench import TwinModel
from twin_bench.leaderboard.harness import Job
from twin_bench.paths import tasks_directory
from twin_bench_lm_eval.harness import LmEval
from twin_bench_lm_eval.model import serving

pytestmark = pytest.mark.versions

SUITE = SimpleNamespace(batch_size=4, max_length=None, split="validation", seed=3)


@pytest.mark.parametrize(("task", "metric"), [("cola", "mcc"), ("stsb", "pearson_spearman"), ("mmlu", "exact_match")])
def test_a_cell_is_what_simple_evaluate_scores(twins, causal_twins, tmp_path, monkeypatch, capfd, task, metric):
    twin = TwinModel.from_pretrained(causal_twins("llama") if task == "mmlu" else twins("bert"))
    data = (write_generative_rows if task == "mmlu" else write_rows)(tmp_path / "data")
    expected = simple_evaluate(
        serving(twin, task=task, batch_size=4, max_length=None),
        tasks=[f"twin_{task}"],
        task_manager=TaskManager(
            include_path=str(tasks_directory()), include_defaults=False, metadata={"data": str(data)}
        ),
        limit=7,
        bootstrap_iters=0,
    )["results"][f"twin_{task}"]
    capfd.readouterr()
    monkeypatch.chdir(tmp_path)  # which git does not know
    monkeypatch.setattr(subprocess.Popen, "__init__", lambda *_, **__: pytest.fail("a process is started"))
    found = LmEval().score(SimpleNamespace(twin=twin), Job("name", *task_rows(data, task), SUITE, tmp_path, rows=7))
    assert (found.score, found.stderr, found.n) == (
        expected[f"{metric},none"],
        expected[f"{metric}_stderr,none"],
        7,
    )
    assert capfd.readouterr().err == ""

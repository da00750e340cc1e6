"""`lm_eval --model twin_merged` as a user runs it, and how a user's mistake ends."""

import json
import re

import pytest

from tests.support.interpreter import ROOT, START, python

MISTAKES = {
    "no twin": (
        ["--model", "twin_merged", "--model_args", "pretrained=nowhere"],
        r"nowhere: no twin there",
    ),
    "no rows": (
        ["--model", "dummy", "--metadata", "data=nowhere"],
        r"nowhere/cola/validation\.jsonl: no such",
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("program", ["script", "module"])
@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_ends_in_one_line_and_status_2(mistake, program, tmp_path):
    arguments, says = MISTAKES[mistake]
    script = tmp_path / "lm_eval"  # what pip writes
    script.write_text(
        "import sys\nfrom lm_eval.__main__ import cli_evaluate\n"
        "if __name__ == '__main__':\n    sys.exit(cli_evaluate())\n"
    )
    (tmp_path / "sitecustomize.py").write_text(START)
    run = [str(script)] if program == "script" else ["-m", "lm_eval"]
    tasks = ["--include_path", str(ROOT / "tasks"), "--tasks", "twin_cola"]
    done = python(*run, *arguments, *tasks, path=[tmp_path])
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    last = done.stderr.splitlines()[-1]
    assert last.startswith("error: ")
    assert re.search(says, last)
    assert done.stderr.count("error: ") == 1


def test_in_other_programs_the_exception_is_the_callers_and_other_errors_keep_their_traceback():
    model = "from twin_bench_lm_eval.model import TwinMerged\n"
    done = python("-c", model + "TwinMerged(pretrained='nowhere')")
    assert (done.returncode, "Traceback" in done.stderr) == (1, True)
    on_command_line = "cli_evaluate = None\n" + model
    done = python("-c", on_command_line + "TwinMerged(pretrained='nowhere')")
    assert (done.returncode, "Traceback" in done.stderr) == (2, False)
    done = python("-c", on_command_line + "1 / 0")
    assert (done.returncode, "ZeroDivisionError" in done.stderr) == (1, True)


@pytest.mark.slow
def test_a_twin_is_evaluated_from_the_command_line(twin_directory, data, tmp_path):
    (tmp_path / "sitecustomize.py").write_text(START)
    done = python(
        *("-m", "lm_eval", "--model", "twin_merged", "--model_args", f"pretrained={twin_directory},fusion=exact"),
        *("--include_path", str(ROOT / "tasks"), "--tasks", "twin_cola,twin_mnli,twin_stsb"),
        *("--batch_size", "auto", "--output_path", str(tmp_path / "out"), "--log_samples"),
        path=[tmp_path],
        TWIN_BENCH_DATA=str(data),
    )
    assert done.returncode == 0, done.stderr
    (file,) = (tmp_path / "out").rglob("results_*.json")
    results = json.loads(file.read_text())
    for task, metric in (("cola", "mcc"), ("mnli", "acc"), ("stsb", "pearson_spearman")):
        cell = results["results"][f"twin_{task}"]
        assert -1 <= cell[f"{metric},none"] <= 1
        assert 0 <= cell[f"{metric}_stderr,none"] < 0.5
        assert cell["sample_len"] == 40
    assert results["config"]["protocol"] == "standard"
    assert {"model", "router", "experts/cola"} <= set(results["config"]["digests"])

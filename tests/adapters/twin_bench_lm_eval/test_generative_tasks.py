"""The four generative tasks through lm-eval: scores, prompts, malformed rows, two processes."""

import json
import os
import random
import re
import subprocess
import sys
from itertools import pairwise
from types import SimpleNamespace

import lm_eval
import pytest
import torch
from lm_eval.api.samplers import FirstNSampler
from lm_eval.tasks import TaskManager

from tests.support import parallel
from tests.support.families import built
from tests.support.interpreter import ADAPTERS, ROOT
from tests.support.rows import write_generative_rows
from twin_bench import InputError
from twin_bench.data.generative import GENERATIVE
from twin_bench.data.rows import few_shot_pool
from twin_bench.leaderboard.inputs import rows_of
from twin_bench.paths import tasks_directory
from twin_bench_lm_eval.causal import CausalTwin
from twin_bench_lm_eval.harness import LmEval
from twin_bench_lm_eval.model import TwinMerged

pytestmark = pytest.mark.versions


@pytest.fixture(scope="module")
def wide(causal_families, wide_llama, tmp_path_factory):
    """Return a twin whose window holds whole prompts."""
    recipe = {**causal_families("llama").recipe, **wide_llama.recipe}
    return built(recipe, tmp_path_factory.mktemp("wide") / "twin")


def served(directory, **options):
    model = TwinMerged(pretrained=str(directory), device="cpu", dtype="float32", **options)
    assert isinstance(model, CausalTwin)
    return model


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_generative_rows(tmp_path_factory.mktemp("generative"))


def evaluate(model, data, tasks, **options):
    manager = TaskManager(
        include_path=str(tasks_directory()), include_defaults=False, metadata={"data": str(data), "shots": 1}
    )
    return lm_eval.simple_evaluate(model, tasks=tasks, task_manager=manager, bootstrap_iters=0, **options)


def test_the_four_tasks_run_and_are_scored(wide, data):
    """lm-eval's own figures against the samples that it logs, scored again here."""
    model = served(wide, batch_size=4)
    results = evaluate(model, data, ["twin_generative"], log_samples=True)
    assert set(results["results"]) == {f"twin_{task}" for task in GENERATIVE}
    prompts = [sample["arguments"][0][0] for samples in results["samples"].values() for sample in samples]
    assert max(len(model.tok_encode(prompt)) for prompt in prompts) < model.max_length - 128  # nothing was cut
    for task in ("mmlu", "truthfulqa", "bbq"):
        samples, scores = results["samples"][f"twin_{task}"], results["results"][f"twin_{task}"]
        assert len(samples) == 7
        right = [float(sample["resps"][0][0].strip() == sample["doc"]["answer"]) for sample in samples]
        assert scores["exact_match,none"] == pytest.approx(sum(right) / 7)
        assert scores["exact_match_stderr,none"] == pytest.approx(torch.tensor(right).std().item() / 7**0.5)
        assert scores["chance,none"] == pytest.approx({"mmlu": 1 / 4}.get(task, 1 / 3))
    assert 0 <= results["results"]["twin_cnn_dailymail"]["rouge_2,none"] <= 1


def test_prompts_are_those_of_the_papers_protocol(data):
    row = json.loads((data / "mmlu" / "validation.jsonl").read_text().splitlines()[0])
    pool = [json.loads(line) for line in (data / "mmlu" / "train.jsonl").read_text().splitlines()]
    task = GENERATIVE["mmlu"]
    examples = task.examples(row, pool, 2)
    assert [example["subject"] for example in examples] == [row["subject"]] * 2
    prompt = task.prompt(row, examples)
    first = examples[0]
    options = "".join(f"{letter}. {choice}\n" for letter, choice in zip("ABCD", first["choices"], strict=True))
    assert prompt.startswith(
        "The following are multiple choice questions (with answers) about "
        f"{row['subject'].replace('_', ' ')}.\n\nQuestion: {first['question']}\n{options}"
        f"Answer: {'ABCD'[first['answer']]}\n\nQuestion: "
    )
    assert prompt.endswith(f"D. {row['choices'][3]}\nAnswer:")
    assert row not in task.examples(row, [row, *pool])


@pytest.mark.parametrize(
    ("task", "change", "says"),
    [
        ("mmlu", {"answer": 9}, "validation.jsonl, line 1: not a row of mmlu"),
        ("mmlu", {"subject": None}, "not a row of mmlu"),
        ("mmlu", {"question": 3}, "not a row of mmlu"),
        ("bbq", {"label": "ans1"}, "not a row of bbq"),
        ("truthfulqa", {"mc1_targets": {"choices": ["a", "b"], "labels": [0, 0]}}, "not a row of truthfulqa"),
        ("cnn_dailymail", {"highlights": " "}, "no answer"),
    ],
)
def test_malformed_rows_are_named(data, tmp_path, task, change, says):
    row = json.loads((data / task / "validation.jsonl").read_text().splitlines()[0])
    (tmp_path / task).mkdir()
    (tmp_path / task / "validation.jsonl").write_text(json.dumps(row | change))
    with pytest.raises(InputError, match=re.escape(says)):
        evaluate("dummy", tmp_path, [f"twin_{task}"])


@pytest.mark.slow
def test_two_processes_answer_as_one(wide, data, tmp_path):
    """`accelerate launch`: each process answers its share of the documents; what comes together is the same."""
    out = tmp_path / "answers.json"
    # accelerate's own launcher wants MPI for CPUs; torchrun starts processes as it does for GPUs.
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    done = subprocess.run(
        [sys.executable, *launch, parallel.__file__, str(wide), str(data), str(out)],
        env=os.environ
        | {
            "OMP_NUM_THREADS": "1",
            "ACCELERATE_USE_CPU": "1",
            "PYTHONPATH": os.pathsep.join(map(str, (ROOT, ADAPTERS))),
        },
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    together = json.loads(out.read_text())
    assert together["processes"] == 2
    alone, expected = parallel.answers(wide, data)
    assert alone.world_size == 1
    for task, found in together["tasks"].items():
        assert found["scores"] == expected[task]["scores"]
        for row, answer in expected[task]["answers"].items():
            close = answer if isinstance(answer[0], str) else pytest.approx(answer, abs=1e-4)  # in other batches
            assert found["answers"][row] == close
    assert {(task, len(found["answers"])) for task, found in together["tasks"].items()} == {
        (task, 7) for task in (*parallel.TASKS, "choices")
    }
    likelihoods = sorted(row[0] for row in expected["choices"]["answers"].values())
    assert min(b - a for a, b in pairwise(likelihoods)) > 1e-3  # no row has another one's


def test_lm_eval_is_told_the_protocol_and_the_batch_size(wide, data):
    """Its command line prints both above the table, and stores them in the results."""
    arguments = {"pretrained": str(wide)}
    results = evaluate("twin_merged", data, ["twin_mmlu"], model_args=arguments, device="cpu", batch_size="auto")
    assert arguments["protocol"] == results["config"]["model_args"]["protocol"] == "standard"
    assert results["config"]["batch_sizes"] == [16]


@pytest.fixture
def hub(monkeypatch):
    """Let the hub hold an MMLU of two subjects: five examples of each in dev, in an order of their own."""
    draw = random.Random(5)

    def row(subject, number):
        choices = [f"{number} {letter}" for letter in "abcd"]
        return {"question": f"Which {number}?", "choices": choices, "answer": draw.randrange(4), "subject": subject}

    subjects = ("anatomy", "world_religions")
    held = {
        "dev": [row(subject, number) for number in range(5) for subject in subjects],
        "test": [row(subject, 10 + number) for number in range(3) for subject in subjects],
    }
    monkeypatch.delenv("TWIN_BENCH_DATA", raising=False)
    monkeypatch.setattr("datasets.load_dataset", lambda name, configuration, split: list(held[split]))
    return held


def test_mmlus_examples_are_the_first_of_dev_on_disk_and_on_the_hub(hub, tmp_path):
    """And those of lm-eval's own MMLU, whose sampler takes the first five of the subject's dev split."""
    folder = tmp_path / "mmlu"
    folder.mkdir()
    for split, name in (("dev", "dev"), ("test", "validation"), ("dev", "train")):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in hub[split]))
    task = GENERATIVE["mmlu"]
    found, local = (few_shot_pool(task, directory) for directory in (None, tmp_path))
    assert found == local
    for row in hub["test"]:
        own = [other for other in hub["dev"] if other["subject"] == row["subject"]]
        expected = FirstNSampler(own).sample(5, eval_doc=row)
        assert task.examples(row, found) == expected
        prompt = task.prompt(row, task.examples(row, found))
        places = [prompt.index(f"{one['question']}\n") for one in expected]
        assert places == sorted(places)


def test_a_leaderboard_of_the_hubs_rows_keeps_the_examples_too(hub, tmp_path):
    suite = SimpleNamespace(data_of=lambda task: "hub", split="validation")
    rows = rows_of(suite, {"mmlu": GENERATIVE["mmlu"]}, tmp_path, LmEval(), trained=True)["mmlu"]
    assert rows.pool() == few_shot_pool(GENERATIVE["mmlu"], None) == hub["dev"]

"""HELM as a harness of the leaderboard: its rows, prompts and statistics on a model that is in memory."""

from __future__ import annotations

import contextlib
import io
import logging
import pickle
import shutil
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import ClassVar

from helm.benchmark.model_deployment_registry import ClientSpec, ModelDeployment, register_model_deployment
from helm.benchmark.model_metadata_registry import ModelMetadata, register_model_metadata
from helm.benchmark.presentation.run_entry import RunEntry
from helm.benchmark.run import run_benchmarking, run_entries_to_run_specs
from helm.benchmark.runner import set_benchmark_output_path
from helm.benchmark.tokenizer_config_registry import TokenizerConfig, TokenizerSpec, register_tokenizer_config
from helm.common.authentication import Authentication

import twin_bench_helm.plugin  # noqa: F401 (registers twin_cnndm)
from twin_bench.contenders import Contender
from twin_bench.data.metrics import mean, mean_standard_error
from twin_bench.data.named import NamedTask
from twin_bench.data.rows import TaskRows
from twin_bench.data.task import Row, Task
from twin_bench.errors import InputError
from twin_bench.files import digest, digest_file, read_record, write_bytes, write_record, written_at_once
from twin_bench.leaderboard.harness import Evaluated, Harness, Job
from twin_bench.leaderboard.suite import Suite
from twin_bench.serving.engine import Engine, hold
from twin_bench.twin.causal import NOT_CAUSAL, TwinCausalLM
from twin_bench_helm.prompts import surrounding_tokens
from twin_bench_helm.samples import HelmScores, KeepingEngine, read_scores, samples_of

SPLITS = {"mmlu": "test", "truthfulqa": "valid", "bbq": "test", "cnn_dailymail": "test"}
"""Which of HELM's splits each task is scored on."""
SUMMARIES = "summarization/data/cnndm.pk"
"""HELM's raw file of CNN/DailyMail."""
COPIES_FORMAT = 1
"""The format of the record of what was copied for HELM."""


class Helm(Harness):
    """HELM. It scores language models on the rows of its own scenarios."""

    name: ClassVar[str] = "helm"
    scores_own_rows: ClassVar[bool] = True
    knows_clusters: ClassVar[bool] = False

    def check(self, suite: Suite) -> None:
        """Raise an InputError for a suite of classifiers, or one that does not say where HELM's raw files are."""
        if suite.classifies:
            raise InputError(f"suite {suite.name}: --harness helm asks for text, and these are classifiers")
        needed = not all(isinstance(task, NamedTask) for task in suite.kinds.values())
        if (needed or suite.helm is not None) and not Path(str(suite.helm)).is_dir():
            raise InputError(
                f"suite {suite.name}: helm: {suite.helm}; name a directory of HELM's raw files, as they lie under "
                "benchmark_output/scenarios"
            )

    def tasks(self, suite: Suite) -> Mapping[str, Task]:
        """Return the suite's tasks, with the metrics of run entries. InputError for a task that HELM does not have."""
        found: dict[str, Task] = dict(suite.kinds)
        for name, task in found.items():
            if isinstance(task, NamedTask):
                found[name] = _entry(task)
            elif name not in SPLITS:
                raise InputError(f"task {name!r}: HELM has no such scenario; give helm: a run entry")
        return found

    def input_digests(self, suite: Suite, tasks: Mapping[str, TaskRows], workspace: Path) -> dict[str, str]:
        """Return the digest of HELM's raw files for each task; InputError that names a file that is missing."""
        scenarios = workspace / "benchmark_output" / "scenarios"
        summaries = next((rows for rows in tasks.values() if rows.task.name == "cnn_dailymail"), None)
        found = "" if suite.helm is None else copy_scenarios(Path(suite.helm), summaries, scenarios)
        for rows in tasks.values():
            run_entries(rows.task, scenarios)  # says which file is missing
        return dict.fromkeys((f"{task}/helm" for task in tasks), found)

    def score(self, contender: Contender, job: Job) -> Evaluated:
        """Score a contender on one task."""
        if not isinstance(contender.twin, TwinCausalLM):
            raise InputError(
                f"suite {job.suite.name}: {NOT_CAUSAL[contender.twin.task_type]}; leave --harness helm out"
            )
        with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
            scored, engine = evaluate(
                contender.twin,
                job.name,
                job.asked.task,
                workspace=job.workspace,
                rows=job.rows,
                batch_size=32 if job.suite.batch_size == "auto" else job.suite.batch_size,  # halved where it must be
            )
        task, score = job.asked.task, mean(scored.values)
        return Evaluated(
            score=task.finite(score) if isinstance(task, NamedTask) else score,
            stderr=mean_standard_error(scored.values) if scored.of_rows else None,
            n=len(scored.values),
            samples=samples_of(scored, engine),
            model_seconds=engine.seconds,
            notes={
                "harness": f"crfm-helm {version('crfm-helm')}",
                **({"set_aside": "; ".join(scored.set_aside)} if scored.set_aside else {}),
            },
        )


def _entry(task: NamedTask) -> NamedTask:
    """Return a run entry's task with its metric. InputError for one of lm-eval's, and for what HELM's entry says."""
    if task.entry is None:
        raise InputError(f"task {task.name!r} is lm-eval's; for --harness helm give helm: a run entry")
    for key, value in (("few_shot", task.few_shot), ("split", task.split)):
        if value is not None:
            raise InputError(f"task {task.name!r}: {key}: HELM's run entry says it; leave {key} out")
    return task.scored_by(task.metric or "exact_match")


def copy_scenarios(scenarios: Path, summaries: TaskRows | None, into: Path) -> str:
    """Copy HELM's raw files to where HELM looks for them. Return a digest of the files that were copied.

    They are copied again where they have changed since, or where a copy has. CNN/DailyMail's pickle, where it is not
    among them, is made of the rows `summaries`: train.jsonl as HELM's train, validation.jsonl as its test rows.
    """
    own = {} if summaries is None else {split: summaries.file(split) for split in ("train", "validation")}
    raw = {file.relative_to(scenarios).as_posix(): file for file in sorted(scenarios.rglob("*")) if file.is_file()}
    sources = digest({name: digest_file(file) for name, file in raw.items()})
    rows = {} if SUMMARIES in raw else {split: digest_file(file) for split, file in own.items() if file.is_file()}
    record = into.with_name(f"{into.name}.json")
    known = read_record(record, format_number=COPIES_FORMAT) or {}
    copies = known.get("copies", {})
    if (known.get("sources"), known.get("rows")) == (sources, rows) and all(
        (into / name).is_file() and digest_file(into / name) == checksum for name, checksum in copies.items()
    ):
        return sources
    shutil.rmtree(into, ignore_errors=True)
    with written_at_once(into) as partial:
        shutil.copytree(scenarios, partial, copy_function=shutil.copyfile, dirs_exist_ok=True)
        if summaries is not None and len(rows) == len(own):
            articles = {split: [_article(row) for row in summaries.read(split)] for split in own}
            raw_file = {"train": articles["train"], "validation": [], "test": articles["validation"]}
            write_bytes(partial / SUMMARIES, pickle.dumps(raw_file))
        copies = {
            file.relative_to(partial).as_posix(): digest_file(file) for file in partial.rglob("*") if file.is_file()
        }
    write_record(record, {"sources": sources, "rows": rows, "copies": copies}, format_number=COPIES_FORMAT)
    return sources


def _article(row: Row) -> Row:
    return {key: row[key] for key in ("article", "highlights")}


def run_entries(task: Task, scenarios: Path) -> list[str]:
    """Return a task's run entries, of the raw files that are in `scenarios` (as under benchmark_output/scenarios).

    Raises InputError that names the file that is missing and where it belongs.
    """
    if isinstance(task, NamedTask):
        return [task.entry or ""]
    name = task.name
    folder, pattern = {
        "mmlu": (scenarios / "mmlu" / "data" / "test", "*_test.csv"),
        "truthfulqa": (scenarios / "truthful_qa" / "data", "TruthfulQA.csv"),
        "bbq": (scenarios / "bbq" / "data", "*"),
        "cnn_dailymail": (scenarios, SUMMARIES),
    }[name]
    files = sorted(file for file in folder.glob(pattern) if file.suffix != ".lock")  # HELM's, beside what it reads
    if not files:
        raise InputError(f"{folder / pattern}: no such file; HELM's raw file of {name} belongs there")
    if name == "mmlu":
        return [f"mmlu:subject={file.stem.removesuffix('_test')}" for file in files]
    if name == "bbq":
        return [f"bbq:subject={file.name}" for file in files]
    return ["truthful_qa:task=mc_single"] if name == "truthfulqa" else ["twin_cnndm:temperature=0.3"]


def evaluate(
    twin: TwinCausalLM,
    name: str,
    task: Task,
    *,
    workspace: Path,
    rows: int | None,
    batch_size: int,
) -> tuple[HelmScores, KeepingEngine]:
    """Run a task's entries on a twin, whole lists at a time and without HELM's cache, and read HELM's statistics.

    Return them with the engine that answered.

    Args:
        twin: the twin.
        name: twin_merged/NAME in HELM's files.
        task: mmlu, truthfulqa, bbq, cnn_dailymail or a run entry, with HELM's name of its metric.
        workspace: where HELM writes, with its raw files in benchmark_output/scenarios (`copy_scenarios`).
        rows: of the task at most, evenly over its entries, drawn as HELM draws them.
        batch_size: requests a forward.

    Raises:
        InputError: not one row could be answered.
    """
    logging.getLogger("helm").setLevel(logging.ERROR)
    output, full = workspace / "benchmark_output", f"twin_merged/{name}"
    entries = run_entries(task, output / "scenarios")
    engine = KeepingEngine(twin, batch_size, task.expert)
    _register(engine, full, workspace)
    set_benchmark_output_path(str(output))
    each = 10**9 if rows is None else -(-rows // len(entries))
    split = SPLITS.get(task.name) if not isinstance(task, NamedTask) else None
    scored = f"model={full}" if split is None else f"model={full},eval_split={split}"  # MMLU has valid rows as well
    asked = [RunEntry(f"{entry}{',' if ':' in entry else ':'}{scored}") for entry in entries]
    specs = run_entries_to_run_specs(asked, max_eval_instances=each)
    run_benchmarking(
        run_specs=specs,
        auth=Authentication(""),
        url=None,
        local_path=str(workspace / "prod_env"),
        num_threads=1,
        output_path=str(output),
        suite="leaderboard",
        dry_run=False,
        skip_instances=False,
        cache_instances=False,
        cache_instances_only=False,
        skip_completed_runs=False,
        exit_on_error=True,
        runner_class_name="twin_bench_helm.client.BatchRunner",
        disable_cache=True,
    )
    scores = read_scores([output / "runs" / "leaderboard" / spec.name for spec in specs], task.metric, split)
    if len(scores.set_aside) >= len(scores.values) > 0:
        raise InputError(f"{name} on {task.name}: HELM has no answer to any row; {scores.set_aside[0]}")
    return scores, engine


def _register(engine: Engine, full: str, workspace: Path) -> None:
    """Make an engine a deployment of its own, with its twin's tokenizer."""
    twin, batch_size = engine.twin, engine.batch_size
    hold(full, engine)
    folder = workspace / "tokenizer" / full.rpartition("/")[2]  # another process may read or write another twin's
    twin.tokenizer.save_pretrained(folder)
    end = twin.tokenizer.eos_token
    spec = TokenizerSpec(
        class_name="helm.tokenizers.huggingface_tokenizer.HuggingFaceTokenizer",
        args={"pretrained_model_name_or_path": str(folder)},
    )
    register_tokenizer_config(TokenizerConfig(full, spec, end, twin.tokenizer.bos_token or end))
    register_model_metadata(
        ModelMetadata(
            name=full,
            creator_organization_name="twin-bench",
            display_name=full,
            description="",
            access="open",
            release_date=None,
            tags=["TEXT_MODEL_TAG"],
        )
    )
    client = ClientSpec(class_name="twin_bench_helm.client.TwinClient", args={"twin": full, "batch_size": batch_size})
    window = twin.max_length - surrounding_tokens(twin.tokenizer, templated=False)
    register_model_deployment(
        ModelDeployment(
            full,
            client,
            full,
            tokenizer_name=full,
            max_sequence_length=window,
            max_sequence_and_generated_tokens_length=window,
        )
    )

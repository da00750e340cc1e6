"""lm-eval's own tasks, by their names: found, described, asked for router rows, and scored."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import logging
import math
import os
import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy
from lm_eval.api.group import Group
from lm_eval.api.task import Task as LmEvalTask
from lm_eval.tasks import TaskManager

from twin_bench.data.named import NamedTask
from twin_bench.data.task import Row
from twin_bench.errors import InputError, first_line, nearest
from twin_bench.files import digest, digest_code, digest_file

FEWSHOT_SEED = 1234
"""The seed with which lm-eval's command draws few-shot examples."""
PROMPTS = 6000
"""The largest number of prompts of a task that a router is given. It uses 5,500 by default."""
CODE = (".py", ".yaml")
"""The suffixes of the files in a user's folder that can decide a score."""
OPTIONS = frozenset(("acc", "acc_norm", "acc_bytes", "acc_mutual_info"))
"""lm-eval's metrics of tasks with options that are 1 where one option is the right one."""
LETTERS = 26
"""The largest number of different answers of which one makes sense as the answer to every question."""
DRAWS = 1000
"""The number of draws of the bootstrap for a standard error that has no formula."""


@dataclass(frozen=True)
class Loaded:
    """A task of lm-eval's, or a group of them: its leaf tasks, and the group's head."""

    tasks: Mapping[str, LmEvalTask]
    group: Group | None

    @property
    def task_dict(self) -> dict[str, Any]:
        """What lm-eval's `evaluate` takes."""
        groups = [] if self.group is None else [self.group, *self.group.get_all_groups()]
        return {"tasks": dict(self.tasks), "groups": {group.name: group for group in groups}}


def find_tasks(names: Sequence[str], include_path: str | None) -> TaskManager:
    """Return lm-eval's index of tasks. If the user's own folder has all names, lm-eval's tasks are not indexed.

    Raises InputError for a folder that is not there.
    """
    if include_path is not None:
        if not Path(include_path).is_dir():
            raise InputError(f"include_path {include_path}: no such folder; name the folder of your lm-eval task files")
        with quiet():
            own = TaskManager(include_path=include_path, include_defaults=False)
        if set(names) <= set(own.all_tasks):
            return own
    with quiet():
        return TaskManager(include_path=include_path)


def load(task: NamedTask, manager: TaskManager, *, unsafe_code: bool, include_path: str | None) -> Loaded:
    """Load a task or a group, and give it the suite's `few_shot` and `split`.

    Raises:
        InputError: a name that lm-eval does not know, a tag, data that can't be loaded, or a task that runs code and
            was not confirmed.
    """
    name = task.name
    if name not in manager.all_tasks:
        where = f" and {include_path}" if include_path else ", or name the folder of yours: include_path"
        raise InputError(f"unknown task {name!r}{nearest(name, manager.all_tasks)}; looked in lm-eval{where}")
    if name in manager.all_tags:
        raise InputError(f"task {name!r} is a tag of lm-eval's, which has no score of its own; name its tasks")
    try:
        with quiet():
            found = manager.load([name])
    except Exception as error:  # what a task's own code, the hub or a damaged file raises
        raise InputError(f"task {name!r}: lm-eval can't load it: {first_line(error)}") from error
    loaded = Loaded(found["tasks"], found["groups"].get(name))
    for leaf in loaded.tasks.values():
        if getattr(leaf, "MULTIMODAL", False):
            raise InputError(f"task {name!r} shows images or sounds, and twins read text; leave it out")
        if getattr(leaf, "UNSAFE_CODE", False) and not unsafe_code:
            raise InputError(
                f"task {name!r} runs code that the model writes; if you trust it on this machine, give "
                "--confirm-run-unsafe-code"
            )
        if task.split is not None:
            _set_split(leaf, task)
        _set_few_shot(leaf, task)
    return loaded


def _set_few_shot(leaf: LmEvalTask, task: NamedTask) -> None:
    own = leaf.get_config("num_fewshot")
    if task.few_shot and own == 0:
        raise InputError(f"task {task.name!r}: few_shot {task.few_shot}; lm-eval's {leaf.task_name} has always 0")
    shots = own or 0 if task.few_shot is None else task.few_shot
    if shots:
        said = f"task {task.name!r}: few_shot {shots}"
        if _scores_texts(leaf):
            raise InputError(f"{said}; {leaf.task_name} scores whole texts, without examples before them")
        pool = getattr(getattr(leaf, "sampler", None), "df", None) or []
        given = getattr(leaf, "fewshot_cfg", None)
        apart = given is not None and given.split == leaf.get_config("test_split")  # lm-eval draws one more
        if hasattr(leaf, "sampler") and len(pool) < shots + apart:
            raise InputError(f"{said}; {leaf.task_name} has {len(pool) - apart if pool else 'no'} examples")
    leaf.set_config(key="num_fewshot", value=shots)


def _set_split(leaf: LmEvalTask, task: NamedTask) -> None:
    splits = list(leaf.dataset or {})
    if task.split not in splits:
        raise InputError(f"task {task.name!r}: no split {task.split!r}{nearest(str(task.split), splits)}")
    leaf.set_config(key="test_split", value=task.split)


def described(task: NamedTask, loaded: Loaded) -> NamedTask:
    """Return a task with its metric, which has its filter's name after a comma, and how the score is read.

    Without a metric in the suite it is the first that lm-eval lists, and without a filter it has the task's first.

    Raises:
        InputError: a metric or a filter that the task does not have, no metric where a function of the task's own names
            the scores, or a group without a score of its own.
    """
    known = _metrics(task, loaded)
    free = loaded.group is None and any(map(_names_metrics_itself, loaded.tasks.values()))
    if free and not task.metric:
        raise InputError(f"task {task.name!r}: give metric: a function of the task's own names its scores")
    metric = task.metric or known[0]
    if "," not in metric:
        first = known[0].partition(",")[2] if free else "none"
        metric = next((key for key in known if key.partition(",")[0] == metric), f"{metric},{first}")
    filters = {key.partition(",")[2] for key in known}
    if metric not in known and (not free or metric.partition(",")[2] not in filters):
        listed = f"its filters: {', '.join(sorted(filters))}" if free else f"it has: {', '.join(known)}"
        raise InputError(f"task {task.name!r}: no metric {task.metric!r}; {listed}")
    leaf = next(iter(loaded.tasks.values()))
    return task.scored_by(metric, higher_is_better=leaf.higher_is_better().get(metric.partition(",")[0]))


def _metrics(task: NamedTask, loaded: Loaded) -> list[str]:
    """Return the keys METRIC,FILTER of the scores that lm-eval lists for a task or a group."""
    filters = list(dict.fromkeys(f.name for leaf in loaded.tasks.values() for f in leaf._filters))
    if loaded.group is None:
        return [
            f"{getattr(metric, '__name__', metric)},{name}"
            for leaf in loaded.tasks.values()
            for metric in leaf.aggregation()
            for name in filters
        ]
    listed = loaded.group.aggregate_metric_list
    if not listed:
        raise InputError(f"task {task.name!r} is a group without a score of its own; name its tasks")
    return [f"{one.metric},{name}" for one in listed for name in one.filter_list or filters]


def _names_metrics_itself(leaf: LmEvalTask) -> bool:
    """Whether a task's own function returns its scores, under names that lm-eval's config does not list."""
    listed = leaf.get_config("metric_list") or []
    return any(callable(one.get("metric")) for one in listed)


def code_digest(include_path: str | None) -> str:
    """Return a digest of lm-eval's version and of the code and task files in the user's folder and below it.

    A task's config holds the functions that it names, and neither what they call nor its filters' code.
    """
    files = [] if include_path is None else sorted(file for file in Path(include_path).rglob("*") if file.is_file())
    own = {str(file.relative_to(str(include_path))): digest_file(file) for file in files if file.suffix in CODE}
    return digest([version("lm_eval"), own])


def rows_digest(loaded: Loaded, code: str) -> str:
    """Return a digest of what a task asks and how it scores.

    It holds the documents that are scored, those that training prompts are made of, few-shot examples, configs, the
    classes' code, and `code_digest`.
    """
    group = None if loaded.group is None else loaded.group.to_dict()  # its weights and metrics
    found = hashlib.sha256(json.dumps([code, group], sort_keys=True, default=str).encode())
    for name, leaf in loaded.tasks.items():
        examples = getattr(getattr(leaf, "sampler", None), "df", None) or []
        training = (doc for _, doc in _sample(_unscored(leaf)))
        own = (name, leaf.dump_config(), digest_code(type(leaf).__module__))
        for part in (*own, *leaf.eval_docs, "examples", *examples, "training", *training):
            found.update(json.dumps(part, sort_keys=True, default=str).encode())
    return found.hexdigest()


def prompts(loaded: Loaded, *, scored: bool) -> Iterator[Row]:
    """Yield {"text", "answer"} of documents, with prompts as they are scored: what a twin's router reads.

    They are a sample of the documents that are `scored`, or else of the training documents. A task without such gives
    its few-shot examples, and one without those its validation documents. If few-shot examples are rows that are
    scored, training prompts have none. A task that scores whole texts has no prompts.

    Raises InputError for a document that the task can't read.
    """
    for name, leaf in loaded.tasks.items():
        leaf.set_fewshot_seed(FEWSHOT_SEED)
        shots = leaf.get_config("num_fewshot") if scored or _examples_split(leaf) != _scored_split(leaf) else 0
        for number, doc in _sample(leaf.eval_docs if scored else _unscored(leaf)):
            with _reading(f"task {name!r}: {'scored' if scored else 'training'} document {number}"):
                context = leaf.fewshot_context(doc, num_fewshot=shots)
                asked = leaf.construct_requests(doc, context, metadata=(leaf.task_name, None, 1))
                first = asked[0] if isinstance(asked, list) else asked
                text, answer = first.args[0], _answer(leaf, doc)
            if text:
                yield {"text": text, "answer": answer}


@contextlib.contextmanager
def _reading(document: str) -> Iterator[None]:
    """Raise an InputError that names the document for whatever a task's own code raises."""
    try:
        yield
    except Exception as error:
        raise InputError(f"{document}: {type(error).__name__}: {first_line(error)}; mend or remove this row") from error


def training_answers(task: NamedTask, loaded: Loaded) -> list[str | int] | None:
    """Return what `expected` says of documents that are not scored; none where answers are free texts.

    Texts are free if more than 26 are different. It is None where a constant answer makes no sense. That is where it
    can't be scored by comparing it: less is better, the score is no fraction, whole texts or single continuations are
    scored, or a function of the task's own scores the options. So it is where all expected answers are the same (many
    tasks list the right option first, or last), or there are none.

    Raises InputError for a document that the task can't read.
    """
    leaves = loaded.tasks
    (kind, *others) = {leaf.OUTPUT_TYPE for leaf in leaves.values()}
    choice = kind == "multiple_choice"
    if others or not (choice or kind == "generate_until") or not (task.higher_is_better and task.percent):
        return None
    own = any(callable(leaf.get_config("process_results")) for leaf in leaves.values())
    if choice and (own or task.metric.partition(",")[0] not in OPTIONS):
        return None
    found = []
    for name, leaf in leaves.items():
        for number, doc in _sample(_unscored(leaf)):
            with _reading(f"task {name!r}: training document {number}"):
                found.append(expected(leaf, doc))
    if len(set(found)) > LETTERS and not choice:
        return []
    return found if 1 < len(set(found)) <= LETTERS else None


def expected(leaf: LmEvalTask, doc: Any) -> str | int:
    """Return the expected answer: the index of the right option, or the text; of several the first.

    A task that scores whole texts expects none, which is an empty text. A right option that is not there is -1.
    """
    if _scores_texts(leaf):
        return ""
    if leaf.OUTPUT_TYPE != "multiple_choice":
        return _answer(leaf, doc)
    target = leaf.doc_to_text(doc) if leaf.multiple_input else leaf.doc_to_target(doc)
    target = target[0] if isinstance(target, list) and target else target
    options = leaf.doc_to_choice(doc)
    if isinstance(target, str):
        return options.index(target) if target in options else -1
    return int(target)


def scored_options(leaf: LmEvalTask, doc: Any, log_likelihoods: Sequence[float], metric: str) -> Any:
    """Return what a metric takes the largest of, (options,): the options' log-likelihoods, as lm-eval scales them."""
    options = leaf.doc_to_choice(doc)
    given = numpy.asarray(log_likelihoods[: len(options)])
    if metric == "acc_mutual_info":
        return given - numpy.asarray(log_likelihoods[len(options) :])
    if metric == "acc_norm":
        return given / [len(option) for option in options]
    return given / [len(option.encode()) for option in options] if metric == "acc_bytes" else given


def _sample(docs: Any) -> Iterator[tuple[int, Any]]:
    """Yield at most PROMPTS documents, drawn by a seed, in their order, each with its number."""
    docs = docs if hasattr(docs, "__getitem__") else list(docs)
    count = len(docs)
    for place in sorted(random.Random(FEWSHOT_SEED).sample(range(count), min(PROMPTS, count))):
        yield place, docs[place]


def _scored_split(leaf: LmEvalTask) -> str | None:
    split: str | None = leaf.get_config("test_split") or leaf.get_config("validation_split")
    return split


def _examples_split(leaf: LmEvalTask) -> str | None:
    """Return the split that few-shot examples are taken from; None if the config lists them itself."""
    given = getattr(leaf, "fewshot_cfg", None)
    split: str | None = getattr(given, "split", None)
    if split is None and getattr(given, "samples", None) is None:
        split = leaf.get_config("training_split") or leaf.get_config("validation_split") or _scored_split(leaf)
    return split


def _unscored(leaf: LmEvalTask) -> Iterable[Any]:
    """Return documents of another split than the one that is scored; none if there is no other.

    A task that scores whole texts has none: its prompts are empty.
    """
    scored = _scored_split(leaf)
    if _scores_texts(leaf):
        return ()
    if leaf.has_training_docs() and leaf.get_config("training_split") != scored:
        return leaf.training_docs()
    examples = getattr(getattr(leaf, "fewshot_cfg", None), "split", None)
    if examples is not None and examples != scored:
        return list(leaf.fewshot_docs())
    if leaf.has_validation_docs() and leaf.get_config("validation_split") != scored:
        return leaf.validation_docs()
    return ()


def _scores_texts(leaf: LmEvalTask) -> bool:
    """Whether a task asks for the likelihood of whole texts, without prompts and answers."""
    return bool(leaf.OUTPUT_TYPE == "loglikelihood_rolling")


def _answer(leaf: LmEvalTask, doc: Any) -> str:
    """Return the text that is expected: of several the first, and of options the right one."""
    target = leaf.doc_to_target(doc)
    target = target[0] if isinstance(target, list) and target else target
    if isinstance(target, int) and leaf.get_config("doc_to_choice") is not None:
        options = leaf.doc_to_choice(doc)
        if not 0 <= target < len(options):
            raise IndexError(f"the right option is {target} of 0 to {len(options) - 1}")
        target = options[target]
    return str(target).strip()


def standard_error(leaf: LmEvalTask, metric: str, values: Sequence[Any], seed: int) -> float | None:
    """Return the bootstrap's standard error of a score that lm-eval gives none, from its documents' values."""
    aggregate: Callable[[Sequence[Any]], float] | None = leaf.aggregation().get(metric)
    if aggregate is None or len(values) < 2:
        return None
    rng = random.Random(seed)
    draws = [aggregate(rng.choices(values, k=len(values))) for _ in range(DRAWS)]
    error = float(numpy.std(draws, ddof=1))
    return error if math.isfinite(error) else None


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Hide lm-eval's bars and what it prints, and logs below an error. Its bootstrap starts no processes."""
    logger = logging.getLogger("lm_eval")
    level = logger.level
    before = os.environ.get("DISABLE_MULTIPROC")
    logger.setLevel(logging.ERROR)
    os.environ["DISABLE_MULTIPROC"] = "1"
    try:
        with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        logger.setLevel(level)
        if before is None:
            del os.environ["DISABLE_MULTIPROC"]
        else:
            os.environ["DISABLE_MULTIPROC"] = before

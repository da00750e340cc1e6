"""The suites that come with the package: they are read, and run on tiny models under the names of the real ones."""

from __future__ import annotations

import copy
import json
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import datasets
import lm_eval.tasks
import peft
import pytest
import torch
import yaml
from lm_eval.tasks import TaskManager
from scipy.stats import spearmanr

from tests.support.models import (
    WORDS,
    tiny_causal,
    tiny_causal_tokenizer,
    tiny_classifier,
    tiny_seq2seq,
    tiny_seq2seq_tokenizer,
    tiny_tokenizer,
)
from tests.support.rows import write_generative_rows
from tests.support.suites import rows_of, run
from twin_bench import paths
from twin_bench.data.generative import GENERATIVE
from twin_bench.data.glue import GLUE
from twin_bench.leaderboard.__main__ import main
from twin_bench.leaderboard.suite import Suite, read_suite
from twin_bench.paths import leaderboards_directory, shipped_suites, tasks_directory

LITERATURE = ("generative-qwen", "glue-flan-t5", "glue-flan-t5-lora", "glue-gpt2", "glue-roberta", "merge-llama")


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Return an empty working directory. A folder in it that is named like a model or a data set wins over the hub."""
    folder = tmp_path_factory.mktemp("here")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", str(folder / "cache"))
        yield folder


def data_set(folder: Path, rows: dict[str, dict[str, list[dict[str, Any]]]]) -> None:
    """Write a data set as the hub has it: {configuration: {split: rows}}, and a card that names its files."""
    card = []
    for configuration, splits in rows.items():
        files = []
        for split, own in splits.items():
            file = folder / configuration / f"{split}.jsonl"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text("".join(json.dumps(row) + "\n" for row in own))
            files.append({"split": split, "path": f"{configuration}/{split}.jsonl"})
        card.append({"config_name": configuration, "data_files": files})
    (folder / "README.md").write_text(f"---\n{yaml.safe_dump({'configs': card})}---\n")


@pytest.fixture(scope="module")
def glue(here: Path) -> dict[str, dict[str, list[dict[str, Any]]]]:
    """Write invented rows of the eight GLUE tasks as nyu-mll/glue; return them."""
    draw = random.Random(0)
    rows: dict[str, dict[str, list[dict[str, Any]]]] = {}
    for name, task in GLUE.items():
        rows[name] = {}
        for split, size in (("train", 12), ("validation_matched" if name == "mnli" else "validation", 7)):
            texts = ({field: " ".join(draw.choices(WORDS, k=5)) for field in task.fields} for _ in range(size))
            labels = (index % task.num_labels if task.labels else draw.uniform(0, 5) for index in range(size))
            rows[name][split] = [
                {**text, "label": label, "idx": index}
                for index, (text, label) in enumerate(zip(texts, labels, strict=True))
            ]
    data_set(here / "nyu-mll" / "glue", rows)
    return rows


def save(model: Any, tokenizer: Any, folder: str) -> None:
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def save_adapters(base: Any, suite: Suite, *, safe_serialization: bool = True, **options: Any) -> None:
    """Save a random LoRA adapter on `base` under the name of each of a suite's experts."""
    for seed, path in enumerate(suite.expert_paths.values()):
        torch.manual_seed(seed)
        plain = copy.deepcopy(base)
        plain.name_or_path = suite.base_model
        adapted = peft.get_peft_model(plain, peft.LoraConfig(r=4, init_lora_weights=False, **options))
        adapted.save_pretrained(path, safe_serialization=safe_serialization)


def board(name: str, out: Path, *arguments: str) -> dict[tuple[str, str, str], dict[str, Any]]:
    assert main(["--suite", name, "--out", str(out / "out"), *arguments]) == 0
    return rows_of(out)


@pytest.mark.parametrize("name", shipped_suites())
def test_a_shipped_suite_is_read(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in ("TWIN_BENCH_DATA", "TWIN_BENCH_EXPERTS"):
        monkeypatch.setenv(variable, "/somewhere")
    suite = read_suite(name)
    assert suite.name == name
    assert len(suite.entries()) > 5
    assert set(suite.expert_paths) >= {task.expert for task in suite.kinds.values()}


def test_the_literatures_suites_need_no_environment_and_their_settings_are_the_authors() -> None:
    suites = {name: read_suite(name) for name in LITERATURE}
    roberta, qwen = suites["glue-roberta"], suites["generative-qwen"]
    entries = {entry.label: entry for entry in roberta.entries()}
    assert roberta.expert_paths["sst2"] == "lu-vae/roberta-glue/sst2/roberta-base_lr1e-05"
    assert roberta.max_length == 128
    assert entries["ties"].options == {"scaling": 0.7, "density": 0.1}
    assert entries["twin"].options["shared"] == {"method": "task_arithmetic", "scaling": 0.29}
    assert entries["twin"].options["exclusive"]["density"] == 0.1
    (twin,) = (entry for entry in qwen.entries() if entry.label == "twin")
    assert twin.options["exclusive"]["rank"] == 8
    assert twin.options["shared"]["scaling"] == 0.3
    assert {task.metric for task in suites["glue-gpt2"].kinds.values()} == {"acc"}


def test_a_shipped_suites_own_tasks_are_found_in_the_checkout_and_in_the_wheel(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = read_suite("glue-flan-t5").include_path
    assert given is not None
    assert Path(given).resolve() == tasks_directory() / "flan_glue"
    for folder in (leaderboards_directory(), tasks_directory()):
        shutil.copytree(folder, tmp_path / "twin_bench" / folder.name)
    monkeypatch.setattr(paths, "__file__", str(tmp_path / "twin_bench" / "paths.py"))
    given = read_suite("glue-flan-t5").include_path
    assert given is not None
    assert Path(given).resolve() == (tmp_path / "twin_bench" / "tasks" / "flan_glue").resolve()


@pytest.fixture(scope="module")
def classifiers(here: Path, glue: Any) -> Callable[[str, str, dict[str, str]], None]:
    """Return a function that saves a tiny base model and experts of a kind under the names that a suite gives."""
    window = {"roberta": {"max_position_embeddings": 130}, "gpt2": {"n_positions": 512}}
    tokenizer = tiny_tokenizer("distilbert")  # as RoBERTa's and GPT-2's, it tells no second text from the first

    def lay_out(kind: str, base_model: str, experts: dict[str, str]) -> None:
        base = tiny_classifier(kind, config=window[kind])
        save(base, tokenizer, base_model)
        for seed, (task, path) in enumerate(experts.items(), 1):
            expert = tiny_classifier(kind, GLUE[task].num_labels, seed, like=base, config=window[kind])
            save(expert, tokenizer, path)

    return lay_out


def test_roberta_runs_on_tiny_models_under_the_papers_names(classifiers: Any, tmp_path: Path) -> None:
    suite = read_suite("glue-roberta")
    classifiers("roberta", suite.base_model, suite.expert_paths)
    rows = board("glue-roberta", tmp_path, "--methods", "ties,twin", "--limit", "5")
    assert {(protocol, method) for protocol, method, _ in rows} == {
        *(
            (protocol, method)
            for protocol in suite.protocol
            for method in ("pretrained", "experts", "constant", "twin")
        ),
        *((protocol, "ties") for protocol in ("paper", "standard")),
    }
    assert {task for _, _, task in rows} == set(GLUE)
    assert rows["paper", "twin", "rte"]["n"] == 5


def test_gpt2_runs_on_tiny_models_under_fusionbenchs_names(classifiers: Any, tmp_path: Path) -> None:
    suite = read_suite("glue-gpt2")
    classifiers("gpt2", suite.base_model, suite.expert_paths)
    rows = board("glue-gpt2", tmp_path, "--methods", "task_arithmetic,twin", "--limit", "5")
    assert {row["metric"] for row in rows.values()} == {"acc"}
    assert {row["score"] % 20 for row in rows.values()} == {0}  # of five rows, as accuracy has it, CoLA's too


@pytest.fixture(scope="module")
def causal(here: Path) -> Callable[[str, dict[str, str]], Any]:
    """Return a function that saves a tiny language model, and experts of it, under the names that a suite gives."""

    def lay_out(base_model: str, experts: dict[str, str]) -> Any:
        base = tiny_causal("llama")
        base.config.max_position_embeddings = 1024  # rotary: no parameters
        save(base, tiny_causal_tokenizer(), base_model)
        for seed, path in enumerate(experts.values(), 1):
            save(tiny_causal("llama", seed, like=base), tiny_causal_tokenizer(), path)
        return base

    return lay_out


OWN_CODE = {
    "configuration_own.py": "from transformers import LlamaConfig\n\n\n"
    "class OwnConfig(LlamaConfig):\n    model_type = 'own'\n",
    "modeling_own.py": "from transformers import LlamaForCausalLM\n\nfrom .configuration_own import OwnConfig\n\n\n"
    "class OwnForCausalLM(LlamaForCausalLM):\n    config_class = OwnConfig\n",
}
"""A model whose class is beside its weights, as Qwen-14B's is."""


def test_qwen_runs_on_a_tiny_model_of_its_own_code_with_pickled_adapters(
    causal: Any, here: Path, tmp_path: Path
) -> None:
    suite = read_suite("generative-qwen")
    base = causal(suite.base_model, {})
    folder = here / suite.base_model
    for name, code in OWN_CODE.items():
        (folder / name).write_text(code)
    own = {"AutoConfig": "configuration_own.OwnConfig", "AutoModelForCausalLM": "modeling_own.OwnForCausalLM"}
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "own", "auto_map": own}))
    save_adapters(base, suite, target_modules=["q_proj", "down_proj"], safe_serialization=False)
    assert (here / suite.expert_paths["mmlu"] / "adapter_model.bin").is_file()
    generative_data_sets(here, tmp_path)
    rows = board("generative-qwen", tmp_path, "--methods", "task_arithmetic,twin", "--limit", "2")
    assert {(protocol, method) for protocol, method, _ in rows} == {
        (protocol, method)
        for protocol in ("paper", "standard")
        for method in ("pretrained", "experts", "constant", "lead_3", "task_arithmetic", "twin")
    }
    assert {task for _, _, task in rows} == {"mmlu", "truthfulqa", "bbq", "cnn_dailymail"}


def generative_data_sets(here: Path, scratch: Path) -> None:
    """Write invented rows of the four generative tasks as the hub has their data sets."""
    written = write_generative_rows(scratch / "rows")
    for name, task in GENERATIVE.items():
        hub, configuration, scored, examples = task.hub
        train, validation = (
            [json.loads(line) for line in (written / name / f"{split}.jsonl").read_text().splitlines()]
            for split in ("train", "validation")
        )
        splits = {scored: validation, examples: train}
        if examples is None:  # a tenth of the rows becomes the training rows
            splits = {scored: [{**row, "question": f"{row['question']} {copy}"} for copy in "abc" for row in train]}
        data_set(here / hub, {configuration: splits})


@pytest.fixture(scope="module")
def flan_glue(glue: Any) -> Any:
    """Return lm-eval's index of the shipped tasks."""
    return TaskManager(include_path=str(tasks_directory() / "flan_glue"), include_defaults=False)


@pytest.mark.parametrize(
    ("task", "prompt", "answers"),
    [
        (
            "cola",
            "Indicate if the following sentence is grammatically correct or not: \"{sentence}\". Answere 'acceptable' "
            "or 'unacceptable'.",
            ["unacceptable", "acceptable"],
        ),
        (
            "mnli",
            "Does the premise: '{premise}' logically imply, contradict, or is neutral to the hypothesis: '{hypothesis}'"
            "? Answere with 'entailment', 'contradiction', or 'neutral'.",
            ["entailment", "neutral", "contradiction"],
        ),
        (
            "qnli",
            "Given the context: '{sentence}', does the question '{question}' have an answer based on the information "
            "provided? Answer with 'yes' or 'no'.",
            ["yes", "no"],
        ),
        (
            "rte",
            "Does the text: '{sentence1}' entail that '{sentence2}' is true? Provide 'yes' or 'no'.",
            ["yes", "no"],
        ),
        (
            "stsb",
            "Consider the sentences '{sentence1}' and '{sentence2}'. On a scale from 1 (completely different) to 5 "
            "(completely similar), rate the similarity.",
            None,
        ),
    ],
)
def test_glue_as_text_asks_what_the_flan_t5_experts_were_trained_on(
    flan_glue: Any, glue: Any, task: str, prompt: str, answers: list[str] | None
) -> None:
    (loaded,) = flan_glue.load([f"flan_glue_{task}"])["tasks"].values()
    documents = list(loaded.validation_docs())
    assert len(documents) == 7
    for doc in documents:
        assert loaded.fewshot_context(doc, num_fewshot=0) == prompt.format(**doc)
        assert loaded.doc_to_target(doc) == (answers[doc["label"]] if answers else f"{doc['label']:.1f}")


def test_stsb_as_text_is_spearmans_correlation_and_no_number_is_nought(flan_glue: Any, glue: Any) -> None:
    (task,) = flan_glue.load(["flan_glue_stsb"])["tasks"].values()
    documents = list(task.validation_docs())
    answers = ["3.0", "4.5", "no", "nan", "1.0 ", "2", "5"]
    numbers = [3.0, 4.5, 0.0, 0.0, 1.0, 2.0, 5.0]
    pairs = [task.process_results(doc, [answer])["spearman"] for doc, answer in zip(documents, answers, strict=True)]
    references = [float(f"{doc['label']:.1f}") for doc in documents]
    assert task.aggregation()["spearman"](pairs) == pytest.approx(spearmanr(references, numbers).statistic)


def test_glue_as_text_draws_training_rows_and_scores_all_others(flan_glue: Any, glue: Any) -> None:
    (task,) = flan_glue.load(["flan_glue_qqp"])["tasks"].values()
    for split, size in (("train", 6000), ("validation", 6001)):
        rows = datasets.Dataset.from_dict({"idx": range(6001)}, split=split)
        kept = task.config.process_docs(rows)["idx"]
        assert len({*kept}) == size
        assert (list(kept[:9]) == list(range(9))) == (split == "validation")


def test_flan_t5_runs_on_tiny_models_under_fusionbenchs_names(glue: Any, tmp_path: Path) -> None:
    suite, tokenizer = read_suite("glue-flan-t5"), tiny_seq2seq_tokenizer()
    base = tiny_seq2seq("flan-t5")
    save(base, tokenizer, suite.base_model)
    for seed, path in enumerate(suite.expert_paths.values(), 1):
        save(tiny_seq2seq("flan-t5", seed, like=base), tokenizer, path)
    rows = board("glue-flan-t5", tmp_path, "--methods", "twin", "--limit", "1")
    assert {method for _, method, _ in rows} == {"pretrained", "experts", "constant", "twin"}
    assert {task: row["metric"] for (_, _, task), row in rows.items()} == {
        f"flan_glue_{name}": "spearman,none" if name == "stsb" else "exact_match,none" for name in GLUE
    }


def test_flan_t5_runs_on_tiny_lora_adapters_under_fusionbenchs_names(glue: Any, tmp_path: Path) -> None:
    suite = read_suite("glue-flan-t5-lora")
    base = tiny_seq2seq("flan-t5")
    save(base, tiny_seq2seq_tokenizer(), suite.base_model)
    save_adapters(base, suite, target_modules=["q", "v"], task_type="SEQ_2_SEQ_LM")
    rows = board("glue-flan-t5-lora", tmp_path, "--methods", "knots", "--limit", "1")
    assert {method for _, method, _ in rows} == {"pretrained", "experts", "constant", "knots"}


def test_merge_llama_names_tasks_of_lm_eval_and_runs_those_that_need_nothing_more(
    causal: Any, here: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    suite, shipped = read_suite("merge-llama"), Path(lm_eval.tasks.__file__).parent
    folders = ("gsm8k", "hendrycks_math", "humaneval", "ifeval", "mbpp", "okapi")  # the index of all takes 8 seconds
    manager = TaskManager(include_path=[str(shipped / folder) for folder in folders], include_defaults=False)
    assert set(suite.kinds) <= set(manager.all_tasks)
    monkeypatch.setattr("twin_bench_lm_eval.harness.find_tasks", lambda names, include_path: manager)
    causal(suite.base_model, suite.expert_paths)
    draw = random.Random(0)

    def text() -> str:
        return " ".join(draw.choices(WORDS, k=4))

    options = [
        {"id": o, "instruction": text(), **{f"option_{e}": text() for e in "abcde"}, "answer": o} for o in "ABCD"
    ]
    endings = [{"ctx_a": text(), "ctx_b": text(), "activity_label": "a", "endings": [text()] * 4, "label": "1"}] * 4
    sums = [{"question": text(), "answer": f"{text()} #### {number}"} for number in range(4)]
    for name, rows in (("openai/gsm8k", sums), ("alexandrainst/m_mmlu", options), ("alexandrainst/m_arc", options)):
        splits = dict.fromkeys(("train", "validation", "test"), rows)
        data_set(here / name, {"main" if rows is sums else "fr": splits})
    data_set(here / "alexandrainst" / "m_hellaswag", {"fr": {"val": endings}})
    router = here / "router.jsonl"
    router.write_text(
        "".join(json.dumps({"text": text(), "task": expert}) + "\n" for expert in suite.expert_paths for _ in range(6))
    )
    raw = yaml.safe_load(shipped_suites()["merge-llama"].read_text())
    raw["tasks"] = {task: raw["tasks"][task] for task in ("gsm8k_cot", "m_mmlu_fr", "arc_fr", "hellaswag_fr")}
    assert run(raw, tmp_path, "--router", str(router), "--methods", "twin", "--limit", "2", "--batch-size", "2") == 0
    assert {row["metric"] for row in rows_of(tmp_path).values()} == {
        "exact_match,flexible-extract",
        "acc,none",
        "acc_norm,none",
    }

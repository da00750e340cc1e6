"""Rows of a hub that this test serves, and how it refuses them. tests/test_hub.py reads those of every task."""

import datasets
import pytest

from tests.support.hub import TOKEN, Hub, ask
from tests.support.hub_datasets import card, parquet
from twin_bench.data.generative import GENERATIVE
from twin_bench.data.glue import GLUE
from twin_bench.data.rows import NoSplitError, few_shot_pool, hub_rows
from twin_bench.errors import InputError

COLA = {"sentence": datasets.Value("string"), "label": datasets.ClassLabel(names=["no", "yes"])}
ROWS = [{"sentence": "the cat sat", "label": 1}, {"sentence": "cat the sat", "label": 0}]


@pytest.fixture
def hub(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "datasets"))
    monkeypatch.setattr(datasets.config, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    with Hub() as served:
        ask(served, tmp_path, monkeypatch)
        monkeypatch.setattr(datasets.config, "HF_ENDPOINT", served.endpoint)
        yield served


def add_cola(hub, **options):
    files = {"README.md": card({"cola": ["train"]}), "cola/train-0.parquet": parquet(ROWS, COLA)}
    hub.add("nyu-mll/glue", files, kind="datasets", **options)


def refused(task, split):
    with pytest.raises(InputError) as error:
        hub_rows(task, split)
    assert "\n" not in str(error.value)
    assert "run again, log in if it is private or gated (`hf auth login`, or set HF_TOKEN), or give" in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("access", ["gated", "private"])
def test_rows_without_access_are_one_line_and_a_token_opens_them(hub, monkeypatch, access):
    add_cola(hub, access=access)
    assert refused(GLUE["cola"], "train").startswith("cola: the hub's nyu-mll/glue cannot be read (Dataset ")
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert hub_rows(GLUE["cola"], "train") == ROWS
    assert all("authorization" not in headers for _, path, headers in hub.log if path.startswith("/storage"))


def test_a_download_of_rows_that_fails_leaves_nothing_half_written(hub, monkeypatch):
    add_cola(hub)
    monkeypatch.setattr("time.sleep", lambda seconds: None)  # between the client's tries
    hub.faults["nyu-mll/glue/cola/train-0.parquet"] = [500, *[("cut", 100)] * 6]
    assert "500" in refused(GLUE["cola"], "train")
    assert "closed connection" in refused(GLUE["cola"], "train")
    assert hub_rows(GLUE["cola"], "train") == ROWS
    with pytest.raises(NoSplitError, match='cola: the hub\'s nyu-mll/glue: Unknown split "test"'):
        hub_rows(GLUE["cola"], "test")


def test_rows_that_are_damaged_on_the_hub_are_one_line(hub):
    files = {"README.md": card({"cola": ["train"]}), "cola/train-0.parquet": b"no parquet at all"}
    hub.add("nyu-mll/glue", files, kind="datasets")
    refused(GLUE["cola"], "train")


def test_few_shot_examples_are_of_the_hubs_own_split(hub):
    features = {"question": COLA["sentence"], "subject": COLA["sentence"], "answer": datasets.ClassLabel(num_classes=4)}
    features["choices"] = datasets.Sequence(datasets.Value("string"))
    splits = {
        split: [
            {"question": split, "subject": "anatomy", "choices": list("wxyz"), "answer": index} for index in range(3)
        ]
        for split in ("test", "dev")
    }
    files = {f"all/{split}-0.parquet": parquet(rows, features) for split, rows in splits.items()}
    hub.add("cais/mmlu", {"README.md": card({"all": ["test", "dev"]}), **files}, kind="datasets")
    assert hub_rows(GENERATIVE["mmlu"], "validation") == splits["test"]
    assert few_shot_pool(GENERATIVE["mmlu"], None) == splits["dev"]

"""A stand-in for a TwinModel, requests as lm-eval makes them, and a directory of rows."""

import hashlib
import json
import random

import pytest
import torch
from lm_eval.api.instance import Instance

from tests.support.lm_eval_requests import text
from twin_bench.data.glue import GLUE
from twin_bench.data.task import joined
from twin_bench.twin.classifier import Prediction
from twin_bench_lm_eval.classifier import ClassifierTwin


class FakeTwin:
    """Answers each input with logits from a digest of it; under `routed`, of a head from it likewise."""

    tokenizer = None
    max_length = 128
    tolerance = 0.0

    def __init__(self, tasks=tuple(GLUE), protocol="standard"):
        self.expert_names = tuple(tasks)
        self.protocol = protocol
        self.num_labels = {name: GLUE[name].num_labels for name in tasks}
        self.digests = {"model/model.safetensors": "abc"}
        self.calls = []

    def classify(self, texts, tasks, *, batch_size, max_length, progress):
        self.calls.append([(*text, task) for text, task in zip(texts, tasks, strict=True)])
        self.options = batch_size, max_length
        progress(2 * len(tasks))
        return [self.answer(*text, task) for text, task in zip(texts, tasks, strict=True)]

    def answer(self, text, text_pair, task):
        digest = hashlib.sha256(repr((text, text_pair, task)).encode()).digest()
        routed = self.protocol == "routed"
        head = self.expert_names[digest[0] % len(self.expert_names)] if routed else task
        numbers = torch.frombuffer(bytearray(digest), dtype=torch.int32).float() / 2**30
        return Prediction(head, numbers[: self.num_labels[head]])


@pytest.fixture
def fake_twin():
    return FakeTwin()


@pytest.fixture
def served():
    """Make the lm-eval model of a fake twin."""

    def make(twin=None, **arguments):
        return ClassifierTwin(twin=twin or FakeTwin(), **arguments)

    return make


@pytest.fixture
def ask():
    """Make one request of a task about a text."""

    def request(task, text, pair=None, answer=" 0", **changes):
        doc = {"text": text, "text_pair": pair, "task": task, "label": 0, "idx": 0} | changes
        kind = "generate_until" if task == "stsb" else "loglikelihood"
        return Instance(kind, doc, (joined(text, pair), answer), 0, metadata=(f"twin_{task}", 0, 1))

    return request


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    """A directory of TASK/{train,validation}.jsonl: 40 validation rows a task, 10 for training."""
    root, rng = tmp_path_factory.mktemp("data"), random.Random(0)
    words = ["a", "the", "cat", "dog", "sits", "runs", "big", "small", "7", "1999"]
    for task in GLUE.values():
        (root / task.name).mkdir()
        for split, size in (("train", 10), ("validation", 40)):
            rows = []
            for idx in range(size):
                texts = {field: " ".join(rng.choices(words, k=rng.randint(1, 6))) for field in task.fields}
                label = rng.randint(0, 25) / 5 if task.is_regression else rng.randrange(task.num_labels)
                rows.append({**texts, "label": label, "idx": 100 + idx})
            (root / task.name / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return root


@pytest.fixture
def twin_directory(twins):
    """A tiny real twin of cola, stsb and mnli experts."""
    return twins("bert")


@pytest.fixture(scope="module")
def requests():
    """Return (context, continuation) pairs: shared contexts, none, one over the window; prompts; documents."""
    rng = random.Random(0)
    contexts = [text(rng, size) for size in (3, 6, 9, 4)]
    pairs = [(context, f" {text(rng, size)}") for context in contexts for size in (1, 1, 3)]
    pairs += [("", text(rng, 3)), (f"{text(rng, 5)} ", text(rng, 2)), (text(rng, 60), f" {text(rng, 2)}")]
    return pairs, [*contexts, text(rng, 70)], [text(rng, 8), text(rng, 90), text(rng, 3)]

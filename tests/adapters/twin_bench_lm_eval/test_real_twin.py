"""A real (tiny) twin through the tasks, against the twin asked directly."""

import lm_eval
import pytest
from lm_eval.tasks import TaskManager

from twin_bench import TwinModel
from twin_bench.data.glue import GLUE
from twin_bench.data.metrics import score
from twin_bench.data.rows import read_rows, split_path
from twin_bench.paths import tasks_directory
from twin_bench_lm_eval.classifier import ClassifierTwin
from twin_bench_lm_eval.model import TwinMerged

TASKS = ("cola", "stsb", "mnli")


def evaluate(model, data, tasks=TASKS, **options):
    manager = TaskManager(include_path=str(tasks_directory()), include_defaults=False, metadata={"data": str(data)})
    return lm_eval.simple_evaluate(model, tasks=[f"twin_{task}" for task in tasks], task_manager=manager, **options)


@pytest.mark.parametrize("protocol", ["standard", "routed"])
def test_scores_are_those_of_the_twin_asked_row_by_row(twin_directory, data, protocol):
    twin = TwinModel.from_pretrained(twin_directory, protocol=protocol)
    model = TwinMerged.create_from_arg_obj({"pretrained": twin_directory, "protocol": protocol})
    results = evaluate(model, data)
    heads = set()
    for name in TASKS:
        task = GLUE[name]
        rows = read_rows(split_path(data, name), task)
        predictions = []
        for row in rows:
            (answer,) = twin.classify([task.texts(row)], [name])
            heads.add((name, answer.head))
            number = float(answer.logits[0])
            label = int(answer.logits.argmax())
            if task.is_regression:
                predictions.append(number if answer.head == "stsb" else label)
            else:
                predictions.append(-1 if answer.head == "stsb" else label)
        expected = score(task.metric, [row["label"] for row in rows], predictions)
        cell = results["results"][f"twin_{name}"]
        assert cell[f"{task.metric},none"] == pytest.approx(expected / 100, abs=1e-5)
    assert results["config"]["protocol"] == protocol
    assert results["config"]["digests"] == twin.digests
    # Only under `routed` does another task's head answer.
    assert any(task != head for task, head in heads) == (protocol == "routed")


def test_samples_hold_the_heads_probabilities_whatever_the_batches(twin_directory, data):
    twin = TwinModel.from_pretrained(twin_directory)
    alone = evaluate(ClassifierTwin(twin=twin, batch_size=1), data, ["mnli"])["samples"]["twin_mnli"]
    mixed = evaluate(ClassifierTwin(twin=twin, batch_size=32), data)["samples"]["twin_mnli"]
    for one, other in zip(alone, mixed, strict=True):
        (answer,) = twin.classify([(one["doc"]["text"], one["doc"]["text_pair"])], ["mnli"])
        expected = answer.logits.log_softmax(0).tolist()
        assert [value for value, _ in one["filtered_resps"]] == pytest.approx(expected, abs=1e-5)
        assert [value for value, _ in other["filtered_resps"]] == pytest.approx(expected, abs=1e-5)


def test_max_length_cuts_the_input(twin_directory, ask):
    model = ClassifierTwin(pretrained=twin_directory, max_length=6)
    long, longer = (ask("cola", "the cat sat on " + rest) for rest in ("a bird", "a bird and a big dog"))
    other = ask("cola", "the cat saw on a bird")
    answers = model.loglikelihood([long, longer, other])
    assert answers[0] == pytest.approx(answers[1])
    assert answers[0] != pytest.approx(answers[2])

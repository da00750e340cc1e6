import json
import math
import random

import pytest
from lm_eval.api.model import CachingLM

from twin_bench.errors import InputError
from twin_bench.files import digest
from twin_bench_lm_eval.classifier import ClassifierTwin
from twin_bench_lm_eval.model import TwinMerged

pytestmark = pytest.mark.versions


def manifest(path, **changes):
    description = {"format_version": 1, "task_type": "sequence_classification", "experts": [], "files": {}}
    (path / "twin.json").write_text(json.dumps(description | changes))
    return path


@pytest.fixture
def loaded(monkeypatch, fake_twin):
    """Record what a twin is loaded with."""
    calls = []

    def from_pretrained(directory, **options):
        calls.append((directory, options))
        fake_twin.protocol = options["protocol"]
        return fake_twin

    monkeypatch.setattr("twin_bench_lm_eval.classifier.TwinClassifier.from_pretrained", from_pretrained)
    return calls


def test_a_twin_directory_is_served_by_the_class_for_its_task_type(tmp_path, loaded, fake_twin):
    path = manifest(tmp_path)
    model = TwinMerged.create_from_arg_string(
        f"pretrained={path},protocol=paper,dtype=auto,trust_remote_code=True,data=somewhere,split=train",
        {"batch_size": "auto", "max_batch_size": None, "device": "cpu"},
    )
    assert type(model) is ClassifierTwin
    assert model.twin is fake_twin
    options = {"device": "cpu", "dtype": None, "protocol": "paper", "tolerance": None, "trust_remote_code": True}
    assert loaded == [(str(path), options)]
    assert model.get_model_info() == {
        "model_revision": "main",
        "model_sha": digest(fake_twin.digests),
        "twin_bench_version": model.get_model_info()["twin_bench_version"],
        "protocol": "paper",
        "fusion": "exact",
        "tolerance": 0.0,
        "max_length": 128,
        "digests": fake_twin.digests,
    }


def test_features_are_kept_where_a_directory_is_named(tmp_path, loaded, monkeypatch):
    monkeypatch.delenv("TWIN_BENCH_CACHE", raising=False)
    assert ClassifierTwin(pretrained=tmp_path).twin.feature_cache is None
    monkeypatch.setenv("TWIN_BENCH_CACHE", str(tmp_path))
    assert ClassifierTwin(pretrained=tmp_path).twin.feature_cache == tmp_path / "features"


def test_the_command_lines_default_device_is_no_error_without_a_gpu(tmp_path, loaded, monkeypatch):
    for gpu, used in ((False, "cpu"), (True, "cuda:0")):
        monkeypatch.setattr("torch.cuda.is_available", lambda gpu=gpu: gpu)
        ClassifierTwin(pretrained=tmp_path, device="cuda:0")
        assert loaded[-1][1]["device"] == used


def test_directories_that_are_not_served(tmp_path):
    with pytest.raises(InputError, match="no twin there"):
        TwinMerged(pretrained=tmp_path)
    with pytest.raises(InputError, match="name a twin directory"):
        TwinMerged()
    with pytest.raises(InputError, match="name a twin directory"):
        ClassifierTwin()
    with pytest.raises(InputError, match="task_type 'seq2seq'; known: sequence_classification, causal_lm"):
        TwinMerged(pretrained=manifest(tmp_path, task_type="seq2seq"))


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"protocl": "paper"}, "unknown argument 'protocl'; did you mean 'protocol'?"),
        ({"fusion": "batch"}, "fusion=batch; known: exact"),
        ({"batch_size": 0}, "batch_size=0; expected a positive whole number"),
        ({"batch_size": "many"}, "batch_size=many"),
        ({"max_length": -1}, "max_length=-1"),
        ({"protocol": "paper"}, "protocol=paper, but the twin was loaded for standard"),
    ],
)
def test_arguments_are_checked(served, arguments, says):
    with pytest.raises(InputError) as error:
        served(**arguments)
    assert says in str(error.value)


@pytest.mark.parametrize(("given", "used"), [("auto", 32), ("auto:4", 32), (7, 7), ("7", 7)])
def test_batch_size_and_length_reach_the_twin(served, fake_twin, ask, given, used):
    served(fake_twin, batch_size=given, max_length=64).loglikelihood([ask("cola", "x")])
    assert fake_twin.options == (used, 64)


def test_a_label_has_the_heads_log_softmax(served, fake_twin, ask):
    requests = [ask("mnli", "a", "b", f" {label}") for label in range(3)]
    answers = served(fake_twin).loglikelihood(requests)
    logits = fake_twin.answer("a", "b", "mnli").logits
    assert [value for value, _ in answers] == pytest.approx(logits.log_softmax(0).tolist())
    assert sum(math.exp(value) for value, _ in answers) == pytest.approx(1)
    assert [greedy for _, greedy in answers] == [label == logits.argmax() for label in range(3)]


def test_each_distinct_input_is_asked_once_in_one_call(served, fake_twin, ask):
    inputs = [
        ("cola", "x", None),
        ("sst2", "x", None),
        ("rte", "x", "y"),
        ("qnli", "x", "y"),
        ("rte", "x\ny", None),
    ]
    requests = [ask(task, text, pair, f" {label}") for task, text, pair in inputs * 2 for label in range(2)]
    served(fake_twin).loglikelihood(requests)
    assert len(fake_twin.calls) == 1
    assert sorted(fake_twin.calls[0], key=repr) == sorted([(b, c, a) for a, b, c in inputs], key=repr)


def test_the_order_of_requests_changes_neither_answers_nor_batches(served, fake_twin, ask):
    requests = [
        ask(task, f"text {n}", pair, f" {label}")
        for task, pair in (("cola", None), ("mnli", "b"), ("rte", "b"))
        for n in range(20)
        for label in range(2)
    ]
    model = served(fake_twin)
    answers = model.loglikelihood(requests)
    assert len(set(answers)) == len(requests)  # so that a mix-up would show
    order = random.Random(0).sample(range(len(requests)), len(requests))
    assert model.loglikelihood([requests[n] for n in order]) == [answers[n] for n in order]
    assert fake_twin.calls[0] == fake_twin.calls[1]


def test_a_regression_answers_with_the_exact_number(served, fake_twin, ask):
    requests = [ask("stsb", f"t {n}", "u", {"until": ["\n"]}) for n in range(5)]
    answers = served(fake_twin).generate_until(requests)
    assert [float(answer) for answer in answers] == [
        float(fake_twin.answer(f"t {n}", "u", "stsb").logits[0]) for n in range(5)
    ]


def test_routed_answers_of_other_tasks_heads(served, fake_twin, ask):
    fake_twin.protocol = "routed"
    model = served(fake_twin)
    seen = set()
    for n in range(60):
        head, logits, _ = fake_twin.answer(f"t {n}", "u", "mnli")
        answers = model.loglikelihood([ask("mnli", f"t {n}", "u", f" {label}") for label in range(3)])
        held = 0 if head == "stsb" else len(logits)
        assert [greedy for _, greedy in answers] == [held > 0 and label == logits.argmax() for label in range(3)]
        assert [value == -math.inf for value, _ in answers] == [label >= held for label in range(3)]
        text = model.generate_until([ask("stsb", f"t {n}", "v")])[0]
        other_head, other_logits, _ = fake_twin.answer(f"t {n}", "v", "stsb")
        assert text == repr(float(other_logits[0])) if other_head == "stsb" else str(int(other_logits.argmax()))
        seen |= {head, other_head}
    assert seen == set(fake_twin.expert_names)


@pytest.mark.parametrize(
    ("task", "answer", "says"),
    [
        ("cola", " 2", "task 'twin_cola': '2' is no label of cola: 0, 1"),
        ("cola", " yes", "'yes' is no label"),
        ("mnli", " -1", "'-1' is no label of mnli: 0, 1, 2"),
        ("stsb", " 0", "stsb has a number as its answer"),
    ],
)
def test_an_answer_that_is_no_label_raises_before_the_twin_runs(served, fake_twin, ask, task, answer, says):
    with pytest.raises(InputError, match=says):
        served(fake_twin).loglikelihood([ask(task, "x", None, answer)])
    assert not fake_twin.calls


def test_a_classifier_generates_no_text(served, ask):
    with pytest.raises(InputError, match="task 'twin_cola': a classifier twin does not generate text"):
        served().generate_until([ask("cola", "x")])
    with pytest.raises(InputError, match="a classifier twin does not generate text"):
        served().loglikelihood_rolling([ask("cola", "x")])
    with pytest.raises(InputError, match="no chat template"):
        served().chat_template(True)


def test_rows_that_a_classifier_cannot_read(served, ask):
    model = served()
    request = ask("cola", "x")
    del request.doc["task"]
    with pytest.raises(InputError, match=r"task 'twin_cola': its rows do not say which .*experts: cola, sst2"):
        model.loglikelihood([request])
    with pytest.raises(InputError, match=r"task 'twin_wnli': the twin has no expert for 'wnli'; .* cola, sst2"):
        model.loglikelihood([ask("wnli", "x")])
    request = ask("cola", "x")
    request.arguments = ("Answer well.\n\nx", " 0")
    with pytest.raises(InputError, match=r"task 'twin_cola': a classifier reads the row's own text"):
        model.loglikelihood([request])


def test_use_cache_is_refused(served, tmp_path):
    with pytest.raises(InputError, match=r"--use_cache .*leave it out"):
        CachingLM(served(), str(tmp_path / "cache.db"))


def test_arguments_of_several_devices_are_handed_on(tmp_path, loaded):
    ClassifierTwin(pretrained=tmp_path, parallelize=True, max_cpu_memory="1GiB", offload_folder="folder")
    spread = {"device_map": "auto", "max_memory": {"cpu": "1GiB"}, "offload_folder": "folder"}
    assert spread.items() <= loaded[-1][1].items()
    assert "device" not in loaded[-1][1]

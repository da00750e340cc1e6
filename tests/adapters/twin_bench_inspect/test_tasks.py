"""Five tasks with local rows: a one-expert twin against Inspect's own `hf` on that expert's checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from inspect_ai import Task, eval
from inspect_ai.dataset import Sample
from inspect_ai.log import EvalLog
from inspect_ai.model import GenerateConfig, get_model
from inspect_ai.scorer import choice, match
from inspect_ai.solver import generate, multiple_choice

from tests.support.models import WORDS
from twin_bench.serving.engine import engine
from twin_bench.serving.settings import TwinSettings

STOP = "KK"
"""What some of the answers hold, and no token is."""
INPUTS = [f"the {first} {second}" for first, second in zip(WORDS[2:9], WORDS[9:16], strict=True)]


def task(name: str, scorer: Any = None, solver: Any = None, **options: Any) -> Task:
    samples = [Sample(input=text, target="A", choices=WORDS[:3] if solver else None) for text in INPUTS]
    config = GenerateConfig(**{"max_tokens": 12, "temperature": 0.0, "logprobs": True, **options})
    return Task(dataset=samples, solver=solver or generate(), scorer=scorer, config=config, name=name)


@pytest.fixture(scope="module")
def logs(alone: Path, models: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[EvalLog, ...]]:
    """Return each task's logs: the twin's and that of `hf`, which draws nothing and reads no special tokens."""
    asked = [
        get_model(f"twin_merged/{alone}", device="cpu", batch_size=4),
        get_model("hf/local", model_path=str(models / "mmlu"), device="cpu", do_sample=False),
    ]
    tasks = [
        task("choice", choice(), multiple_choice(), max_tokens=3),
        task("match", match()),
        task("stop", stop_seqs=[STOP, "#nowhere"]),
        task("several", num_choices=3),
        task("likeliest", top_logprobs=4),
    ]
    found = eval(tasks, model=asked, display="none", log_dir=str(tmp_path_factory.mktemp("logs")), max_connections=8)
    assert [log.status for log in found] == ["success"] * 10
    return {
        one.name: tuple(log for api in ("twin_merged", "hf") for log in found if is_of(log, one.name, api))
        for one in tasks
    }


def is_of(log: EvalLog, name: str, api: str) -> bool:
    return log.eval.task == name and log.eval.model.startswith(f"{api}/")


def outputs(log: EvalLog) -> list[Any]:
    assert log.samples
    return [sample.output for sample in log.samples]


@pytest.mark.parametrize("name", ["choice", "match", "stop", "several", "likeliest"])
def test_texts_and_log_probabilities_are_those_of_hf(name: str, logs: Any, alone: Path) -> None:
    tokenizer = engine(str(alone), TwinSettings(device="cpu", batch_size=4)).twin.tokenizer
    cut = 0
    for found, expected in zip(*map(outputs, logs[name]), strict=True):
        for ours in found.choices:
            theirs = expected.choices[0]
            text, stopped, _ = theirs.message.text.partition(STOP if name == "stop" else "#nowhere")
            assert ours.message.text == text
            cut += bool(stopped)
            own = ours.logprobs.content
            assert len(text) - 1 <= len("".join(told.token for told in own)) <= len(text)
            for told, other in zip(own, theirs.logprobs.content, strict=False):
                assert told.token == tokenizer.convert_tokens_to_string([other.token])
                assert told.logprob == pytest.approx(float(other.logprob), abs=1e-4)
                if name == "likeliest":
                    assert [one.token for one in told.top_logprobs] == [
                        tokenizer.convert_tokens_to_string([one.token]) for one in other.top_logprobs
                    ]
                    assert [one.logprob for one in told.top_logprobs] == pytest.approx(
                        [float(one.logprob) for one in other.top_logprobs], abs=1e-4
                    )
    assert bool(cut) == (name == "stop")


@pytest.mark.parametrize("name", ["choice", "match"])
def test_scores_are_those_of_hf(name: str, logs: Any) -> None:
    ours, theirs = logs[name]
    scores = [[sample.scores for sample in log.samples] for log in (ours, theirs)]
    assert [[score.value for score in one.values()] for one in scores[0]] == [
        [score.value for score in one.values()] for one in scores[1]
    ]


def test_a_request_has_as_many_choices_as_it_asks_for(logs: Any) -> None:
    for several, one in zip(outputs(logs["several"][0]), outputs(logs["match"][0]), strict=True):
        assert [choice.message.text for choice in several.choices] == [one.completion] * 3
        assert several.usage.output_tokens == 3 * one.usage.output_tokens
        assert several.usage.input_tokens == one.usage.input_tokens


def test_why_a_text_ended_is_told(logs: Any) -> None:
    for stopped, free in zip(outputs(logs["stop"][0]), outputs(logs["match"][0]), strict=True):
        assert free.stop_reason == ("max_tokens" if free.usage.output_tokens == 12 else "stop")
        assert stopped.stop_reason == ("stop" if STOP in free.completion else free.stop_reason)
    assert {output.stop_reason for output in outputs(logs["stop"][0])} == {"stop", "max_tokens"}

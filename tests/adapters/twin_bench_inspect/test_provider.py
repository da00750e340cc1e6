"""The provider: its answers against dense models and other harnesses, its prompts, its options, what it refuses."""

from __future__ import annotations

import itertools
import logging
import random
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import anyio
import pytest
import torch
from inspect_ai.model import (
    ChatMessageAssistant,
    ChatMessageSystem,
    ChatMessageUser,
    ContentImage,
    GenerateConfig,
    Model,
    ModelOutput,
)
from inspect_ai.tool import ToolCall, ToolInfo
from tokenizers import processors

from tests.support.dense import dense
from tests.support.lm_eval_requests import generated, scored
from tests.support.lm_eval_requests import served as served_by_lm_eval
from tests.support.models import WORDS
from twin_bench import InputError, TwinModel
from twin_bench.serving.engine import Ask, Engine, engine
from twin_bench.serving.settings import TwinSettings

GREEDY = {"temperature": 0.0, "max_tokens": 6}
PROMPTS = [" ".join(random.Random(seed).choices(WORDS, k=2 + seed % 5)) for seed in range(9)]


@pytest.fixture
def three(causal_twins: Any) -> Path:
    return causal_twins("llama")


def answers(model: Model, prompts: Sequence[Any] = PROMPTS, **options: Any) -> list[ModelOutput]:
    """Return the answers to prompts that are asked at the same time."""
    found: dict[int, ModelOutput] = {}

    async def one(place: int, prompt: Any) -> None:
        found[place] = await model.generate(prompt, config=GenerateConfig(**{**GREEDY, **options}))

    async def all_of_them() -> None:
        async with anyio.create_task_group() as group:
            for place, prompt in enumerate(prompts):
                group.start_soon(one, place, prompt)

    try:
        anyio.run(all_of_them)
    except ExceptionGroup as group:
        raise group.exceptions[0] from None
    return [found[place] for place in range(len(prompts))]


def held(directory: Path, **settings: Any) -> Engine:
    """Return the engine of `served(directory, **settings)`."""
    return engine(str(directory), TwinSettings(**{"device": "cpu", **settings}))


def asked_of(model_engine: Engine, monkeypatch: pytest.MonkeyPatch) -> list[list[Ask]]:
    """Return a list that grows by the requests that an engine is asked to answer, list by list."""
    lists: list[list[Ask]] = []
    answer = model_engine.answer
    monkeypatch.setattr(model_engine, "answer", lambda asks, *rest: lists.append(list(asks)) or answer(asks, *rest))
    return lists


def test_answers_are_the_dense_models_helms_and_lm_evals(
    three: Path, served: Any, causal_families: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each prompt's own fused model in float64, the engine as HELM's client asks it, and lm-eval's kinds of request.

    A text's log-probability is compared where its tokens are those that lm-eval finds in it. lm-eval counts spaces at
    a prompt's end with the answer, so the prompts end without, as they do in most chat templates.
    """
    monkeypatch.setattr(held(three).twin.tokenizer, "chat_template", "<{{ messages[0].content }}>")
    found = answers(served(three), logprobs=True, prompt_logprobs=1)
    twin, texts = TwinModel.from_pretrained(three), [f"<{prompt}>" for prompt in PROMPTS]
    prompts = [tuple(twin.tokenizer(text)["input_ids"]) for text in texts]
    asks = [Ask(ids, max_tokens=6, temperature=0.0, top_p=1.0, completions=1, stop=(), seed="") for ids in prompts]
    by_engine = Engine(twin, 8).answer(asks)
    by_lm_eval = served_by_lm_eval(three, batch_size=4)
    generations = by_lm_eval.generate_until(generated(texts, until=["#nowhere"], max_gen_toks=6))
    sums = by_lm_eval.loglikelihood(scored([(text, out.completion) for text, out in zip(texts, found, strict=True)]))
    compared = 0
    for place, (ids, output) in enumerate(zip(prompts, found, strict=True)):
        (choice,) = output.choices
        own = [told.logprob for told in choice.logprobs.content]
        ((completion,), text) = by_engine[place], choice.message.text
        assert text == twin.tokenizer.decode(completion.tokens) == generations[place]
        assert own == pytest.approx(completion.log_probs, abs=1e-4)
        if twin.tokenizer(texts[place] + text)["input_ids"] == [*ids, *completion.tokens]:
            compared += 1
            assert sum(own) == pytest.approx(sums[place][0], abs=1e-4)
        model = dense(causal_families("llama"), twin.route(torch.tensor([ids]))[0])
        with torch.no_grad():
            logits = model(torch.tensor([[*ids, *completion.tokens]])).logits[0].log_softmax(dim=-1)
        assert completion.tokens == logits[len(ids) - 1 : -1].argmax(dim=-1).tolist()
        expected = [float(logits[at, token]) for at, token in enumerate([*ids, *completion.tokens][1:])]
        scored_prompt = [told.logprob for told in choice.prompt_logprobs.content]
        assert [*scored_prompt, *own] == pytest.approx(expected, abs=1e-4)
        assert output.usage.input_tokens == len(ids)
    assert compared


def test_a_conversation_is_asked_in_the_chat_template(
    three: Path, served: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    turns = [ChatMessageSystem(content="be quick"), ChatMessageUser(content="a cat"), ChatMessageAssistant(content="x")]
    turns.append(ChatMessageUser(content="and a dog"))
    model, tokenizer = served(three), held(three).twin.tokenizer
    lists = asked_of(held(three), monkeypatch)
    answers(model, [turns])
    template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{{ eos_token }}{% endfor %}<assistant>"
    monkeypatch.setattr(tokenizer, "chat_template", template)
    adds_one = processors.TemplateProcessing(single="[CLS] $A", special_tokens=[("[CLS]", 2)])
    monkeypatch.setattr(tokenizer.backend_tokenizer, "post_processor", adds_one)
    answers(model, [turns])
    plain, templated = (list(ask.prompt) for ((ask,),) in [lists[:1], lists[1:]])
    assert tokenizer.decode(plain) == "system: be quick\nuser: a cat\nassistant: x\nuser: and a dog\n"
    as_dicts = [{"role": turn.role, "content": turn.text} for turn in turns]
    expected = tokenizer.apply_chat_template(as_dicts, tokenize=True, add_generation_prompt=True, return_dict=True)
    assert templated == expected["input_ids"]


def test_requests_at_the_same_time_share_batches_and_the_event_loop_goes_on(
    three: Path, served: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, ticks = served(three, batch_size=4), []
    lists = asked_of(held(three, batch_size=4), monkeypatch)
    slow = held(three, batch_size=4).answer
    monkeypatch.setattr(held(three, batch_size=4), "answer", lambda *asked: time.sleep(0.2) or slow(*asked))

    async def tick() -> None:
        while True:
            ticks.append(time.perf_counter())
            await anyio.sleep(0.01)

    async def both() -> list[ModelOutput]:
        async with anyio.create_task_group() as group:
            group.start_soon(tick)
            async with anyio.create_task_group() as asking:
                for prompt in [*PROMPTS, *PROMPTS[:3]]:
                    asking.start_soon(model.generate, prompt, (), None, GenerateConfig(**GREEDY))
            group.cancel_scope.cancel()

    anyio.run(both)
    assert sum(map(len, lists)) == 12
    assert max(map(len, lists)) == 4
    assert len(lists) <= 5
    assert len(ticks) > 20
    assert max(after - before for before, after in itertools.pairwise(ticks)) < 0.15


def test_a_seed_makes_draws_that_come_again(three: Path, served: Any) -> None:
    hot = {"temperature": 4.0, "num_choices": 2}
    model = served(three)
    first, again = (answers(model, PROMPTS[:2], seed=3, **hot) for _ in range(2))
    other, unseeded = answers(model, PROMPTS[:2], seed=4, **hot), [answers(model, PROMPTS[:2], **hot) for _ in "ab"]
    told = [[[choice.message.text for choice in output.choices] for output in run] for run in (first, again, other)]
    assert told[0] == told[1] != told[2]
    assert all(len(set(texts)) == 2 for texts in told[0])
    assert [out.completion for out in unseeded[0]] != [out.completion for out in unseeded[1]]
    narrow = [
        answers(model, PROMPTS[:2], temperature=1e3, **{name: value}) for name, value in (("top_k", 1), ("top_p", 0.0))
    ]
    greedy = answers(model, PROMPTS[:2])
    assert [[out.completion for out in run] for run in narrow] == [[out.completion for out in greedy]] * 2


def test_an_answer_ends_with_the_window(three: Path, served: Any) -> None:
    """It is cut there, and a prompt that fills the window has no answer. Inspect's scorers go on with both."""
    model, twin = served(three), held(three).twin
    (output,) = answers(model, ["a " * 25], max_tokens=40)
    room = twin.max_length - output.usage.input_tokens
    assert 0 < room == output.usage.output_tokens < 40
    assert output.stop_reason == "model_length"
    (output,) = answers(model, ["a " * 70])
    assert (output.stop_reason, output.completion) == ("model_length", "")
    assert output.error.endswith("leaves no room for an answer; the window is 64")
    (output,) = answers(model, PROMPTS[:1], max_tokens=None)
    assert output.usage.output_tokens <= 32


def test_inspects_cache_serves_no_other_twin(
    three: Path, served: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its key holds a model's name and address, and the name is only a path."""
    monkeypatch.setenv("INSPECT_CACHE_DIR", str(tmp_path))
    first, again, other = served(three), served(three), served(three, dtype="bfloat16")
    lists = [asked_of(held(three), monkeypatch), asked_of(held(three, dtype="bfloat16"), monkeypatch)]
    for model in (first, again, other):
        answers(model, PROMPTS[:1], cache=True)
    assert [len(asked) for asked in lists] == [1, 1]


REFUSED = [
    ({"frequency_penalty": 0.5}, "frequency_penalty 0.5: a twin has no such option; leave frequency_penalty out"),
    ({"logit_bias": {5: 1.0}}, "logit_bias {5: 1.0}: a twin has no such option"),
    ({"best_of": 3}, "best_of 3: a twin has no such option"),
    ({"prompt_logprobs": 2}, "prompt_logprobs: Input should be less than or equal to 1 (found 2)"),
    ({"temperature": -1.0}, "temperature: Input should be greater than or equal to 0 (found -1.0)"),
    ({"top_p": 1.5}, "top_p: Input should be less than or equal to 1 (found 1.5)"),
    ({"num_choices": 0}, "num_choices: Input should be greater than or equal to 1 (found 0)"),
    ({"stop_seqs": ["a", ""]}, "stop_seqs.1: String should have at least 1 character (found '')"),
]


@pytest.mark.parametrize(("changes", "says"), REFUSED)
def test_what_can_not_be_honoured_is_refused(changes: dict[str, Any], says: str, three: Path, served: Any) -> None:
    with pytest.raises(InputError) as refusal:
        answers(served(three), PROMPTS[:1], **changes)
    assert says in str(refusal.value)


def test_what_changes_nothing_is_taken_and_what_has_no_effect_is_said_once(
    three: Path, served: Any, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        answers(served(three), presence_penalty=0.0, logit_bias={}, best_of=1, reasoning_effort="low", timeout=60)
    (line,) = [record.getMessage() for record in caplog.records if record.name.startswith("twin_bench_inspect")]
    assert line == "twin_merged: reasoning_effort has no effect on a twin, which runs in this process"


def test_what_is_no_text_is_refused(three: Path, served: Any) -> None:
    model = served(three)
    image = ChatMessageUser(content=[ContentImage(image="data:image/png;base64,aGk=")])
    call = ChatMessageAssistant(content="", tool_calls=[ToolCall(id="1", function="f", arguments={})])
    for messages, says in (([image], "role user holds image"), ([call], "role assistant calls a tool")):
        with pytest.raises(InputError, match=says):
            answers(model, [messages])
    with pytest.raises(InputError, match=r"the task has tools \(bash\), and a twin calls none"):
        anyio.run(model.generate, "a", [ToolInfo(name="bash", description="runs")])


def test_a_model_that_can_not_be_made_is_refused_in_one_line(
    three: Path, twins: Any, served: Any, tmp_path: Path
) -> None:
    from inspect_ai._util.error import PrerequisiteError

    for directory, arguments, says in (
        (tmp_path / "none", {}, f"{tmp_path}/none: no twin there (no twin.json); build one with twin-bench build"),
        (twins("bert"), {}, "a classifier twin does not generate text"),
        (three, {"batchsize": 4}, "-M: batchsize: unknown key; did you mean 'batch_size'? known: batch_size, compile"),
        (three, {"tolerance": 2}, "-M: tolerance: Input should be less than 1 (found 2)"),
        (three, {"base_url": "http://a"}, "a twin runs in this process; leave out --model-base-url"),
        (three, {"config": GenerateConfig(best_of=3)}, "best_of 3: a twin has no such option"),
    ):
        with pytest.raises(PrerequisiteError) as refusal:
            served(directory, **arguments)
        message = str(refusal.value.message)
        assert message.startswith(f"ERROR: twin_merged/{directory}: ")
        assert says in message
        assert "\n" not in message


def test_a_directory_is_named_as_a_user_names_it(three: Path, served: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(three.parent)
    monkeypatch.setenv("HOME", str(three.parent))
    addresses = {served(name).api.base_url for name in (three, three.name, f"./{three.name}", f"~/{three.name}")}
    assert addresses == {served("mine", model_path=str(three)).api.base_url}
    assert str(served("mine", model_path=str(three))) == "twin_merged/mine"


def test_the_command_line_prints_the_message_alone(tmp_path: Path) -> None:
    (tmp_path / "task.py").write_text("from inspect_ai import Task, task\n@task\ndef t():\n    return Task()\n")
    command = [sys.executable, "-m", "inspect_ai", "eval", "task.py", "--model", "twin_merged/./[none]"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    shown = " ".join((done.stdout + done.stderr).split())
    assert shown.startswith("ERROR: twin_merged/./[none]: ")
    assert shown.endswith("no twin there (no twin.json); build one with twin-bench build")

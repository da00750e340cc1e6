"""How a request list is answered: the size of its batches, its bar, and what is logged, beside HFLM."""

import functools

import pytest
import torch
from accelerate.utils import find_executable_batch_size
from lm_eval.models.huggingface import HFLM

from tests.support.lm_eval_requests import generated, rolling, scored, served
from twin_bench.compat import SINCE_5
from twin_bench.twin.memory import Budget
from twin_bench.twin.prefix import NO_PREFIX
from twin_bench.twin.rehearsal import rehearse_score
from twin_bench.twin.requests import Generate, Score
from twin_bench_lm_eval.causal import CausalTwin

pytestmark = pytest.mark.versions


@pytest.fixture
def memory(monkeypatch):
    """Give a model a memory that `limit` logits fill. For a twin, it is that of a device which is no CPU."""

    def limited(model, limit):
        forward = model.model.forward

        @functools.wraps(forward)
        def watched(*arguments, **options):
            output = forward(*arguments, **options)
            if output.logits.numel() > limit:
                raise RuntimeError("CUDA out of memory.")
            return output

        monkeypatch.setattr(model.model, "forward", watched)
        if isinstance(model, CausalTwin):
            monkeypatch.setattr(CausalTwin, "device", torch.device("meta"))
        return model

    return limited


def tried(first, fits):
    """Return what accelerate finds: its older versions halve what does not fit, newer ones take a tenth off."""

    @find_executable_batch_size(starting_batch_size=first)
    def size(rows):
        return rows if rows <= fits else out_of_memory()

    return size()


def out_of_memory():
    raise RuntimeError("CUDA out of memory.")


def test_a_batch_holds_as_many_rows_as_fit_of_the_longest_request(three, causal_families, memory, monkeypatch):
    """HFLM computes the logits of whole rows, the twin those that are asked for."""
    # At each of a hundred steps accelerate collects garbage, which takes long in a process with many objects.
    monkeypatch.setattr("accelerate.utils.memory.clear_device_cache", lambda garbage_collection=False: None)
    limit, sizes = 300 * 20 * 10, {"batch_size": "auto", "max_batch_size": 512}
    most = functools.partial(tried, 512)
    hf = HFLM(causal_families("llama").recipe["experts"]["mmlu"], device="cpu", **sizes)
    hf, twin = memory(hf, limit), memory(served(three, **sizes), limit)
    for asked, rows in ((1, 200), (10, 20), (20, 10)):
        request = (None, [5] * (21 - asked), [6] * asked)
        assert hf._detect_batch_size([request], 0) == most(10)
        assert twin._detect_batch_size([request], 0) == most(rows)
    assert twin._detect_batch_size([request, (None, [5], [6])], 1) == most(200)
    assert hf._detect_batch_size() == most(3)
    assert twin._detect_batch_size() == most(200)  # to generate takes one position's logits


def test_a_batch_size_is_looked_for_once_a_list(three, memory, monkeypatch):
    """Processes that answer different groups would wait for each other for ever."""
    model, found = memory(served(three, batch_size="auto", max_batch_size=4), 300 * 16), []
    detect, route_all, sizes = CausalTwin._most_rows, model.twin.route_all, []
    monkeypatch.setattr(CausalTwin, "_most_rows", lambda *given: found.append(detect(*given)) or found[-1])

    def spied(*arguments, batch_size, progress):
        sizes.append(batch_size)
        return route_all(*arguments, batch_size=batch_size)

    monkeypatch.setattr(model.twin, "route_all", spied)
    pairs = [("the small cat", " dog"), ("a bird", " is"), ("the", " dog sat")]
    model.loglikelihood(scored(pairs[:2]))
    model.loglikelihood(scored(pairs))
    model.generate_until(generated(["the cat", "a dog sat"], num_beams=3))
    model.loglikelihood_rolling(rolling(["the cat", "a bird"]))
    assert found == sizes
    assert len(found) == 4
    assert found[0] > found[1]  # of a longer continuation


def test_a_rehearsal_runs_every_way_that_a_list_may_take(three, monkeypatch):
    twin, ways = served(three).twin, []
    logits = twin.logits

    def watched(rows, positions, group, weights, prefix=NO_PREFIX):
        ways.append((len(rows), list(map(len, rows)), positions, group.weights is None, prefix.length))
        return logits(rows, positions, group, weights, prefix)

    monkeypatch.setattr(twin, "logits", watched)
    rehearse_score(twin, [Score([5] * 19, [6, 7]), Score([5] * 20, [6])], 3)
    lengths = [20, 20, 20]
    assert ways == [
        (3, lengths, [18, 19], False, 0),
        (3, lengths, [18, 19], True, 0),
        (3, [2, 2, 2], [0, 1], False, 18),
    ]


def test_the_batch_that_memory_holds_is_reported(three, memory):
    """A plan cuts a batch of sixteen rows to what a limit leaves. Shorter rows may still fill sixteen."""
    model = memory(served(three, batch_size="auto", max_batch_size=16), 10**9)
    request = (None, [5] * 20, [6, 7])
    model.twin.limit_memory(int(model.twin.sizes.held + Budget(model.twin.sizes, 0).needed(5, 21, 2, fused=False)))
    assert model._detect_batch_size([request], 0) == 16
    assert model.batch_sizes == {0: 5}


def test_a_list_has_one_bar_that_counts_routing_too(three, requests, monkeypatch):
    pairs, prompts, documents = requests
    model, bars = served(three, batch_size=2), []
    made = CausalTwin._bar
    monkeypatch.setattr(CausalTwin, "_bar", lambda *given: bars.append(made(*given)) or bars[-1])
    model.loglikelihood(scored(pairs))
    model.generate_until(generated(prompts))
    model.loglikelihood_rolling(rolling(documents))
    windows = sum(-(-len(model.tok_encode(document)) // 64) for document in documents)
    assert [(bar.n, bar.total) for bar in bars] == [(2 * n, 2 * n) for n in (len(pairs), len(prompts), windows)]


def test_truncation_is_reported_as_hflm_reports_it(alone, causal_families, requests, caplog):
    pairs, prompts, documents = requests
    said = []
    hf = HFLM(causal_families("llama").recipe["experts"]["mmlu"], device="cpu", dtype="float32")
    for model in (hf, served(alone)):
        caplog.clear()
        model.loglikelihood(scored(pairs), disable_tqdm=True)
        model.generate_until(generated(prompts), disable_tqdm=True)
        model.loglikelihood_rolling(rolling(documents), disable_tqdm=True)
        said.append(sorted(record.message for record in caplog.records if "runcat" in record.message))
    assert said[0] == said[1]
    assert len(said[0]) == 2


def test_a_list_is_answered_within_its_memory(three, monkeypatch):
    """A small memory holds few rows at a time; the answers are the same."""
    pairs = [(f"the {word} cat sat on", " the dog") for word in ("small", "big", "red", "blue")]
    prompts = [context for context, _ in pairs]
    free = served(three, batch_size=8)
    limited = served(three, batch_size=8, max_memory=int(free.twin.sizes.held + 1.3 * free.twin.sizes.copy))
    sizes, logits = [], limited.twin.logits
    monkeypatch.setattr(limited.twin, "logits", lambda rows, *rest: sizes.append(len(rows)) or logits(rows, *rest))
    for ours, theirs in zip(limited.loglikelihood(scored(pairs)), free.loglikelihood(scored(pairs)), strict=True):
        assert ours == (pytest.approx(theirs[0], abs=1e-4), theirs[1])
    asked = {"max_gen_toks": 4}
    assert limited.generate_until(generated(prompts, **asked)) == free.generate_until(generated(prompts, **asked))
    assert sum(sizes) == 4 > max(sizes)


@pytest.mark.skipif(not SINCE_5, reason="compiled steps need transformers 5")
def test_a_rehearsal_counts_the_cache_of_compiled_steps(three, monkeypatch):
    """It has the length of the whole text from the first token on. No step is compiled."""
    model = served(three, batch_size="auto", max_batch_size=4, compile="on")
    monkeypatch.setattr(CausalTwin, "device", torch.device("meta"))
    made, emptied = [], model.twin.steps._emptied
    monkeypatch.setattr(model.twin.steps, "_emptied", lambda *shape: made.append(shape) or emptied(*shape))
    monkeypatch.setattr(model.twin.steps, "_step", None)
    asked = [Generate((5, 6, 7), 40), Generate((5,) * 20, 30)]
    assert model._texts_that_fit(asked, 1) == 4
    assert made == [(4, 64)] * 2  # with fused weights, and with each row's own
    assert model.twin.steps._cache is None
    assert model._texts_that_fit(asked, 2) == 4
    assert len(made) == 2  # beams are not compiled

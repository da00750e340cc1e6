"""A twin on a CUDA device as lm-eval's model: its answers are those of the CPU, with the batch size that it finds."""

import random

import pytest

from tests.support.lm_eval_requests import generated, rolling, scored, served, text
from twin_bench_lm_eval.model import TwinMerged

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("batch_size", [3, "auto"])
def test_a_language_model_answers_as_on_the_cpu(causal_twins, batch_size):
    rng = random.Random(0)
    pairs = [(text(rng, 3 + row % 5), " " + text(rng, 1 + row % 2)) for row in range(8)]
    prompts, documents = [text(rng, 4 + row) for row in range(5)], [text(rng, 30), text(rng, 90)]
    cpu = served(causal_twins("llama"), batch_size=3)
    gpu = served(causal_twins("llama"), device="cuda", batch_size=batch_size)
    assert gpu.device.type == "cuda"
    expected, found = cpu.loglikelihood(scored(pairs)), gpu.loglikelihood(scored(pairs))
    assert [one for one, _ in found] == pytest.approx([one for one, _ in expected], abs=1e-3)
    assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]
    assert gpu.generate_until(generated(prompts)) == cpu.generate_until(generated(prompts))
    found, expected = (model.loglikelihood_rolling(rolling(documents)) for model in (gpu, cpu))
    assert found == pytest.approx(expected, abs=1e-2)
    if batch_size == "auto":
        assert min(gpu.batch_sizes.values()) >= len(pairs)


def test_an_encoder_decoder_answers_as_on_the_cpu(seq2seq_twins):
    rng = random.Random(0)
    pairs = [(text(rng, 3 + row % 5), " " + text(rng, 1 + row % 2)) for row in range(8)]
    prompts = [text(rng, 4 + row) for row in range(5)]
    cpu, gpu = (
        TwinMerged(pretrained=str(seq2seq_twins("flan-t5")), device=device, dtype="float32", batch_size=size)
        for device, size in (("cpu", 3), ("cuda", "auto"))
    )
    expected, found = cpu.loglikelihood(scored(pairs)), gpu.loglikelihood(scored(pairs))
    assert [one for one, _ in found] == pytest.approx([one for one, _ in expected], abs=1e-3)
    assert gpu.generate_until(generated(prompts)) == cpu.generate_until(generated(prompts))

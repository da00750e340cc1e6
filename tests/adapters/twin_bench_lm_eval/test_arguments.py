"""The arguments of a language model's twin: what is handed on to HFLM and transformers, and what is refused."""

import re

import pytest
from lm_eval.models.huggingface import HFLM

from tests.support.lm_eval_requests import scored, served
from twin_bench import InputError
from twin_bench_lm_eval.model import TwinMerged

pytestmark = pytest.mark.versions


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"fusion": "batch"}, "fusion=batch; known: exact"),
        ({"protocol": "papper"}, "protocol=papper; did you mean 'paper'"),
        ({"batchsize": 3}, "unknown argument 'batchsize'; did you mean 'batch_size'"),
        (
            {"peft": "adapter"},
            "peft=adapter: a twin's shared expert is the checkpoint in its directory; leave",
        ),
        (
            {"tp_plan": "auto"},
            "tp_plan=auto: tensor parallelism splits the matrices that a twin's layers add to",
        ),
        ({"max_memory": {"cpu": 9}}, "max_memory={'cpu': 9}: it is one device's memory, such as 40GB; the memory of"),
        ({"max_memory": "1GB", "parallelize": True}, "max_memory=1GB: it is one device's memory"),
        ({"max_memory": "much"}, "max_memory 'much': expected bytes, or a text such as 40GB"),
        ({"max_memory": "9KB"}, "max_memory 9000: the twin alone takes"),
        ({"device_map": "autto"}, "device_map: device 'autto'"),
        ({"device_map": {"model": "cpu"}}, "device_map leaves out lm_head.weight; name a device for each part"),
        ({"parallelize": True, "max_cpu_memory": "much"}, "max_memory {'cpu': 'much'}: "),
        ({"device_map": {"": "disk"}, "offload_folder": "/proc/none"}, "weights.safetensors: can't be written"),
        ({"softmax_dtype": "float16"}, "softmax_dtype=float16: a twin's log-softmax is in float32"),
        (
            {"load_in_8bit": True},
            "load_in_8bit=True: a twin is quantised by its own argument, quantization=4bit or 8bit",
        ),
        ({"attn_implementation": "fastest"}, "can't be loaded with attn_implementation=fastest: "),
        ({"attn_implementatoin": "sdpa"}, "unknown argument 'attn_implementatoin'; did you mean 'attn_implementation'"),
        ({"torch_dtype": "bfloat16"}, "torch_dtype=bfloat16: a twin has the precision `dtype`; leave torch_dtype out"),
        ({"dtype": "float32", "torch_dtype": "bfloat16"}, "torch_dtype=bfloat16: a twin has the precision `dtype`"),
        ({"to_dict": 3}, "unknown argument 'to_dict'"),
        ({"hidden_size": 16}, "can't be loaded with hidden_size=16: "),
        ({"dtype": "bf16"}, "dtype 'bf16': known"),
        ({"compile": "of"}, "compile=of; did you mean 'off'"),
        ({"batch_size": "x"}, "batch_size=x; expected a positive whole number"),
        ({"max_length": 65}, "max_length=65; the model's window is 64"),
    ],
)
def test_arguments_are_checked(three, arguments, says):
    with pytest.raises(InputError, match=re.escape(says)):
        TwinMerged(pretrained=str(three), device="cpu", **arguments)


@pytest.mark.parametrize(
    ("arguments", "holds"),
    [
        ({"attn_implementation": "eager"}, lambda model: model.config._attn_implementation == "eager"),
        ({"rms_norm_eps": 0.5}, lambda model: model.config.rms_norm_eps == 0.5),
        (
            {"rope_scaling": {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0}},
            lambda model: model.config.rope_scaling["factor"] == 2.0,
        ),
        ({"use_safetensors": True, "low_cpu_mem_usage": True}, bool),
        (
            {"parallelize": False, "revision": "main", "softmax_dtype": "float32", "backend": "causal"},
            lambda model: True,
        ),
    ],
)
def test_what_hflm_hands_to_transformers_is_handed_on(alone, causal_families, arguments, holds):
    expert = causal_families("llama").recipe["experts"]["mmlu"]
    twin, hf = served(alone, **arguments), HFLM(expert, device="cpu", dtype="float32", **arguments)
    assert holds(twin.twin.model)
    assert holds(hf.model)
    pairs = [("the cat", " dog sat"), ("a bird", " is")]
    found, expected = (model.loglikelihood(scored(pairs)) for model in (twin, hf))
    assert [one for one, _ in found] == pytest.approx([one for one, _ in expected], abs=1e-4)
    passed_on = {name: str(value) for name, value in arguments.items() if "parallelize" not in arguments}
    assert twin.get_model_info()["loaded_with"] == passed_on

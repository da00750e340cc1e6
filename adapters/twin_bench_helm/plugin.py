"""The module of HELM's entry-point group: it registers this project's run spec. It does not import torch.

`twin-bench helm-config` writes the files that name models, tokenizers and deployments.
"""

from __future__ import annotations

from helm.benchmark.adaptation.common_adapter_specs import get_summarization_adapter_spec
from helm.benchmark.metrics.common_metric_specs import get_basic_metric_specs
from helm.benchmark.run_spec import RunSpec, run_spec_function
from helm.benchmark.scenarios.scenario import ScenarioSpec


@run_spec_function("twin_cnndm")  # type: ignore[untyped-decorator]
def cnndm(temperature: float = 0.3) -> RunSpec:
    """Return the run spec of the paper's CNN/DailyMail: HELM's summarization_cnndm, scored only by ROUGE.

    HELM's own run spec also needs BERTScore and summ-eval, which can't be installed with a current torch.
    """
    scenario = ScenarioSpec(
        class_name="twin_bench_helm.scenario.CnnDailyMail",
        args={"dataset_name": "cnn-dm", "sampling_min_length": 50, "sampling_max_length": 150, "doc_max_length": 512},
    )
    return RunSpec(
        name=f"twin_cnndm:temperature={temperature}",
        scenario_spec=scenario,
        adapter_spec=get_summarization_adapter_spec(num_sents=3, max_tokens=128, temperature=temperature),
        metric_specs=get_basic_metric_specs(["rouge_1", "rouge_2", "rouge_l"]),
        groups=["summarization_cnndm"],
    )

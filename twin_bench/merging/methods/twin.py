"""theta*(x) = theta_s + sum_t w_t(x) v_t: a shared expert, compressed exclusive experts, and a router, fused per input.

Built by `twin_bench.twin.builder`, run by `twin_bench.TwinModel`.
"""

from twin_bench.merging.registry import unmerged_method

unmerged_method(
    "twin",
    title="Twin-Merging",
    paper="arXiv:2406.15479",
    track="routed",
    needs=("task ids of training inputs", "seed"),
    shared={"method": "task_arithmetic", "scaling": 0.3},
    exclusive={"density": 0.1},
    router={"layer": -1},
)

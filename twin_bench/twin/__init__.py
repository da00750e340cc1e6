"""The twin: exclusive vectors, router, fusion, the model that joins them, and its directory on disk.

Importing this package imports both kinds of twins, so that `TwinModel.from_pretrained` knows them.
"""

from twin_bench.twin.causal import TwinCausalLM
from twin_bench.twin.classifier import TwinClassifier

__all__ = ["TwinCausalLM", "TwinClassifier"]

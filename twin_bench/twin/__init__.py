"""The twin: exclusive vectors, router, fusion, the model that joins them, and its directory on disk.

Importing this package imports all kinds of twins, so that `TwinModel.from_pretrained` knows them.
"""

from twin_bench.twin.causal import TwinCausalLM
from twin_bench.twin.classifier import TwinClassifier
from twin_bench.twin.seq2seq import TwinSeq2Seq

__all__ = ["TwinCausalLM", "TwinClassifier", "TwinSeq2Seq"]

"""The benchmark of fusion: `run.bench` measures, `classifier` and `causal` hold its cases; it is twin-bench bench.

Importing this package imports no torch.
"""

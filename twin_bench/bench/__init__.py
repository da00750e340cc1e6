"""The benchmark of fusion, which is twin-bench bench: `run.bench` measures, `classifier` and `causal` hold its cases.

Importing this package does not import torch.
"""

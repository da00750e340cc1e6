"""twin-bench's plugin for HELM: `helm-run --run-entries mmlu:subject=anatomy,model=twin_merged/NAME`.

Importing this package imports neither HELM nor torch.
"""

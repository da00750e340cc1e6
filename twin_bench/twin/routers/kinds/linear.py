"""Multinomial logistic regression on the task ids of training inputs."""

from __future__ import annotations

from typing import Annotated

import numpy as np
import torch
from pydantic import Field
from sklearn.linear_model import LogisticRegression
from torch import Tensor, nn

from twin_bench.twin.routers.base import Examples, Router, RouterConfig
from twin_bench.twin.routers.registry import router_kind

STEPS = 300
"""The largest number of steps of L-BFGS."""


@router_kind("linear", title="Logistic regression", paper="")
class LinearRouter(Router):
    """softmax(W z + b), z the standardised features: logistic regression with an L2 penalty, by L-BFGS.

    `strength` is the inverse of the penalty, scikit-learn's C. What is stored reads the features as they are.
    """

    trains = True

    def __init__(self, config: RouterConfig) -> None:
        super().__init__(config)
        self.linear = nn.utils.skip_init(nn.Linear, config.width, len(config.experts))

    @classmethod
    def fit(
        cls, config: RouterConfig, examples: Examples, *, strength: Annotated[float, Field(gt=0)] = 0.1
    ) -> LinearRouter:
        """Fit the regression. Standardisation is folded into W and b."""
        features = examples.features.double().numpy()
        mean, deviation = features.mean(axis=0), features.std(axis=0)
        deviation[deviation == 0] = 1
        router = cls(config)
        coefficients, intercept = np.zeros((len(config.experts), config.width)), np.zeros(len(config.experts))
        if len(config.experts) > 1:
            model = LogisticRegression(C=strength, max_iter=STEPS)
            model.fit((features - mean) / deviation, examples.owners.numpy())
            coefficients, intercept = model.coef_, model.intercept_
            if len(config.experts) == 2:  # scikit-learn stores the difference of two logits
                coefficients, intercept = (np.concatenate([-x, x]) / 2 for x in (coefficients, intercept))
        folded = coefficients / deviation
        with torch.no_grad():
            router.linear.weight.copy_(torch.from_numpy(folded))
            router.linear.bias.copy_(torch.from_numpy(intercept - folded @ mean))
        return router

    def forward(self, features: Tensor) -> Tensor:
        """Return logits (N, T) for features (N, width)."""
        logits: Tensor = self.linear(features)
        return logits

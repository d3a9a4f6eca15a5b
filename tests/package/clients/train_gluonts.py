"""GluonTS: DeepAR in torch, trained by Lightning, with sampled forecasts."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import pandas as pd
from gluonts.dataset.common import ListDataset
from gluonts.torch import DeepAREstimator
from torch import nn


def build() -> Any:
    return DeepAREstimator(
        freq="h",
        prediction_length=6,
        context_length=12,
        hidden_size=16,
        lags_seq=[1, 2, 3, 24],
        num_parallel_samples=20,
        batch_size=16,
        num_batches_per_epoch=5,
        trainer_kwargs={
            "max_epochs": 2,
            "accelerator": "cpu",
            "logger": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
        },
    )


def train(estimator: Any) -> tuple[Iterable[nn.Module], dict[str, Any]]:
    generator = np.random.default_rng(0)
    hours = np.arange(120)
    data = ListDataset(
        [
            {
                "start": pd.Period("2024-01-01 00:00", freq="h"),
                "target": 10 + np.sin(hours / 4 + phase) + 0.1 * generator.normal(size=120),
            }
            for phase in range(4)
        ],
        freq="h",
    )
    trained = estimator.train_model(data)
    forecasts = [forecast.samples for forecast in trained.predictor.predict(data)]
    network = trained.predictor.prediction_net
    loss = trained.trainer.callback_metrics["train_loss"]
    results = {"samples": np.stack(forecasts), "loss": loss}
    return [network], results | dict(network.named_parameters())

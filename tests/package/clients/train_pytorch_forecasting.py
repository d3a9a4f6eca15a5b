"""PyTorch Forecasting: DeepAR with LSTM and RecurrentNetwork with GRU, trained by Lightning."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from typing import Any

import lightning
import numpy as np
import pandas as pd
from pytorch_forecasting import DeepAR, RecurrentNetwork, TimeSeriesDataSet
from pytorch_forecasting.metrics import MAE
from torch import nn

warnings.filterwarnings("ignore")


def build() -> Any:
    generator = np.random.default_rng(0)
    frame = pd.DataFrame(
        {
            "series": np.repeat([str(index) for index in range(6)], 40),
            "time": np.tile(np.arange(40), 6),
            "value": np.sin(np.arange(240) / 3) + 0.1 * generator.normal(size=240),
        }
    )
    data = TimeSeriesDataSet(
        frame,
        time_idx="time",
        target="value",
        group_ids=["series"],
        min_encoder_length=4,
        max_encoder_length=12,
        max_prediction_length=4,
        time_varying_unknown_reals=["value"],
    )
    deep_ar = DeepAR.from_dataset(data, hidden_size=16, rnn_layers=2, dropout=0.1)
    recurrent = RecurrentNetwork.from_dataset(
        data, cell_type="GRU", hidden_size=16, rnn_layers=2, dropout=0.1, loss=MAE()
    )
    return data, [deep_ar, recurrent]


def roots(built: Any) -> Iterable[nn.Module]:
    return built[1]


def train(built: Any) -> tuple[Iterable[nn.Module], dict[str, Any]]:
    data, models = built
    batches = data.to_dataloader(train=True, batch_size=16)
    results = {}
    for index, model in enumerate(models):
        trainer = lightning.Trainer(
            max_epochs=2,
            limit_train_batches=5,
            accelerator="cpu",
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            gradient_clip_val=0.1,
        )
        trainer.fit(model, batches)
        model.eval()
        x, _ = next(iter(data.to_dataloader(train=False, batch_size=16)))
        results[f"{index} loss"] = trainer.callback_metrics["train_loss_epoch"]
        results[f"{index} prediction"] = model(x)["prediction"]
        results |= {f"{index} {name}": p for name, p in model.named_parameters()}
    return models, results

"""skorch: a classifier around a module with an LSTM and a GRU, three epochs."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from skorch import NeuralNetClassifier
from torch import Tensor, nn


class Classifier(nn.Module):
    """Maps [B,T,1] to two probabilities."""

    def __init__(self, hidden_size: int = 16) -> None:
        super().__init__()
        self.lstm = nn.LSTM(1, hidden_size, batch_first=True, bidirectional=True)
        self.gru = nn.GRU(2 * hidden_size, hidden_size, num_layers=2, dropout=0.1, batch_first=True)
        self.head = nn.Linear(hidden_size, 2)

    def forward(self, x: Tensor) -> Tensor:
        y, _ = self.lstm(x)
        y, _ = self.gru(y)
        return torch.softmax(self.head(y[:, -1]), dim=-1)


def build() -> Any:
    return NeuralNetClassifier(
        Classifier, max_epochs=3, lr=0.01, batch_size=32, optimizer=torch.optim.Adam, verbose=0
    ).initialize()


def roots(net: Any) -> Iterable[nn.Module]:
    return [net.module_]


def train(net: Any) -> tuple[Iterable[nn.Module], dict[str, Any]]:
    generator = np.random.default_rng(0)
    labels = generator.integers(0, 2, 192)
    steps = np.arange(20) * np.where(labels == 1, 0.6, 0.3)[:, None]
    x = np.sin(steps + generator.normal(size=(192, 1))).astype(np.float32)[:, :, None]
    net.partial_fit(x, labels)
    results = {name: net.history[:, name] for name in ("train_loss", "valid_loss")}
    results["probabilities"] = net.predict_proba(x)
    return [net.module_], results | dict(net.module_.named_parameters())

"""TorchRL: LSTMModule and GRUModule over rollouts that contain several episodes."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModule, TensorDictSequential
from torch import nn
from torchrl.modules import GRUModule, LSTMModule, set_recurrent_mode

B, T, H = 6, 12, 16


def build() -> Any:
    return TensorDictSequential(
        LSTMModule(
            input_size=3,
            hidden_size=H,
            num_layers=2,
            in_keys=["observation", "lstm_h", "lstm_c"],
            out_keys=["features", ("next", "lstm_h"), ("next", "lstm_c")],
        ),
        GRUModule(
            input_size=H,
            hidden_size=H,
            in_keys=["features", "gru_h"],
            out_keys=["embedding", ("next", "gru_h")],
        ),
        TensorDictModule(nn.Linear(H, 1), in_keys=["embedding"], out_keys=["value"]),
    )


def roots(policy: Any) -> Iterable[nn.Module]:
    return [policy]


def _rollout(steps: int) -> TensorDict:
    is_init = torch.zeros(B, steps, 1, dtype=torch.bool)
    is_init[:, 0] = True
    is_init[torch.rand(B, steps) < 0.2] = True
    return TensorDict(
        {
            "observation": torch.randn(B, steps, 3),
            "is_init": is_init,
            "lstm_h": torch.zeros(B, steps, 2, H),
            "lstm_c": torch.zeros(B, steps, 2, H),
            "gru_h": torch.zeros(B, steps, 1, H),
        },
        batch_size=[B, steps],
    )


def train(policy: Any) -> tuple[Iterable[nn.Module], dict[str, Any]]:
    optimizer = torch.optim.Adam(policy.parameters(), lr=1e-2)
    losses = []
    for _ in range(10):
        data = _rollout(T)
        with set_recurrent_mode(True):
            value = policy(data.clone())["value"]
        loss = (value.squeeze(-1) - data["observation"].sum(-1)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    data = _rollout(1).squeeze(1)
    with torch.no_grad():  # single steps, like a policy in its environment
        for _ in range(3):
            after = policy(data.clone())
            for name in ("lstm_h", "lstm_c", "gru_h"):
                data[name] = after["next", name]
            data["is_init"] = torch.zeros(B, 1, dtype=torch.bool)
    results = {"losses": losses, "value": after["value"], "state": after["next", "lstm_c"]}
    return [policy], results | dict(policy.named_parameters())

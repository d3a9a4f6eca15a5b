"""sb3-contrib: RecurrentPPO on CartPole, with one LSTM each in actor and critic."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
from sb3_contrib import RecurrentPPO
from torch import nn


def build() -> Any:
    return RecurrentPPO(
        "MlpLstmPolicy",
        "CartPole-v1",
        n_steps=128,
        batch_size=64,
        n_epochs=4,
        seed=0,
        device="cpu",
        policy_kwargs={"lstm_hidden_size": 32},
    )


def roots(model: Any) -> Iterable[nn.Module]:
    return [model.policy]


def train(model: Any) -> tuple[Iterable[nn.Module], dict[str, Any]]:
    model.learn(512)
    results = {
        "episodes": [episode["r"] for episode in model.ep_info_buffer],
        **{name: model.logger.name_to_value[f"train/{name}"] for name in ("loss", "value_loss")},
    }
    observations = np.random.default_rng(0).normal(size=(10, 4)).astype(np.float32)
    state = None
    actions = []
    for observation in observations:
        action, state = model.predict(observation, state=state, deterministic=True)
        actions.append(int(action))
    results |= {"actions": actions, "hidden": state[0], "cell": state[1]}
    return [model.policy], results | dict(model.policy.named_parameters())

"""Opacus: training with clipped per-sample gradients, with its own layers and with fastrnn's.

Opacus rejects ``torch.nn.LSTM`` and offers DPLSTM instead. In the way "torch" the models hold
DPLSTM, DPGRU and DPRNN, whose hooks compute per-sample gradients. In the other ways they hold
fastrnn's LSTM, GRU and RNN, and ``torch.func`` computes per-sample gradients
(``grad_sample_mode="functorch"``). Training adds no noise: the layers order their parameters
differently and would draw different noise.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from typing import Any

import torch
from opacus import PrivacyEngine
from opacus.layers import DPGRU, DPLSTM, DPRNN
from opacus.validators import ModuleValidator
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_sequence

INPUT, HIDDEN, BATCH, STEPS = 5, 8, 12, 7
OWN = {"LSTM": DPLSTM, "GRU": DPGRU, "RNN": DPRNN}

warnings.filterwarnings("ignore")


def _layer(name: str, *args: Any, **options: Any) -> nn.Module:
    """Returns the layer of the current way, with the weights of the layer in torch.nn."""
    module = getattr(nn, name)(*args, **options)
    if not _is_torch():
        return module
    with torch.random.fork_rng():  # later random draws are the same in all ways
        own = OWN[name](*args, **options)
    own.load_state_dict(module.state_dict())
    return own


def _is_torch() -> bool:
    return nn.LSTM.__module__.startswith("torch.")


def _first_output(cls: type[nn.Module]) -> type[nn.Module]:
    """Returns a subclass that returns only the output, because ``functorch`` supports only one."""

    class Layer(cls):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x)[0]

    return Layer


class Outputs(nn.Module):
    """A layer that returns its output without the states."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)[0]


class Classifier(nn.Module):
    """Maps [B,T,I] to two logits."""

    def __init__(self, name: str) -> None:
        super().__init__()
        layer = _layer(name, INPUT, HIDDEN, batch_first=True)
        if _is_torch():
            self.encoder: nn.Module = Outputs(layer)
        else:
            with torch.random.fork_rng():
                self.encoder = _first_output(type(layer))(INPUT, HIDDEN, batch_first=True)
            self.encoder.load_state_dict(layer.state_dict())
        self.head = nn.Linear(HIDDEN, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.encoder(x)[:, -1])


def build() -> Any:
    layers = {name: _layer(name, INPUT, HIDDEN, num_layers=2, bidirectional=True) for name in OWN}
    return layers, {name: Classifier(name) for name in OWN}


def _compare_layers(layers: dict[str, nn.Module]) -> dict[str, Any]:
    """Returns outputs and gradients of every layer for a padded batch and packed sequences."""
    results: dict[str, Any] = {}
    rows = torch.randn(STEPS, BATCH, INPUT)
    packed = pack_sequence([torch.randn(length, INPUT) for length in (7, 5, 5, 2)])
    for name, layer in layers.items():
        for kind, x in (("padded", rows), ("packed", packed)):
            layer.zero_grad()
            y, states = layer(x)
            output = y if kind == "padded" else y.data
            h_n = states[0] if name == "LSTM" else states
            (output.square().sum() + h_n.sum()).backward()
            results |= {f"{name} {kind} output": output, f"{name} {kind} h_n": h_n}
            for weight, parameter in layer.named_parameters():
                results[f"{name} {kind} d_{weight}"] = parameter.grad.clone()
    return results


def _train_privately(name: str, model: nn.Module) -> tuple[nn.Module, dict[str, Any]]:
    """Runs DP-SGD without noise.

    Returns:
        The model, and the per-sample gradients of the first step, the losses and final weights.
    """
    assert ModuleValidator.validate(model) == []
    x, labels = torch.randn(BATCH, STEPS, INPUT), torch.randint(2, (BATCH,))
    data = torch.utils.data.TensorDataset(x, labels)
    private, optimizer, _ = PrivacyEngine().make_private(
        module=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.5),
        data_loader=torch.utils.data.DataLoader(data, batch_size=BATCH),
        noise_multiplier=0.0,
        max_grad_norm=0.5,
        poisson_sampling=False,
        grad_sample_mode="hooks" if _is_torch() else "functorch",
    )
    results: dict[str, Any] = {}
    losses = []
    for step in range(5):
        loss = nn.functional.cross_entropy(private(x), labels)
        optimizer.zero_grad()
        loss.backward()
        if step == 0:
            for weight, parameter in _weights(model).items():
                results[f"{name} sample gradients {weight}"] = parameter.grad_sample
        optimizer.step()
        losses.append(loss.item())
    results[f"{name} losses"] = losses
    return model, results | {f"{name} {key}": value for key, value in _weights(model).items()}


def _weights(model: nn.Module) -> dict[str, Any]:
    """Returns the parameters under torch's names, which the layers of Opacus use too."""
    return {n.replace("encoder.layer.", "encoder."): w for n, w in model.named_parameters()}


def train(built: Any) -> tuple[Iterable[nn.Module], dict[str, Any]]:
    layers, models = built
    results = _compare_layers(layers)
    modules = list(layers.values())
    for name, model in models.items():
        module, own = _train_privately(name, model)
        modules.append(module)
        results |= own
    return modules, results

"""States, gates and predictions of a model at every character of a text.

The layers run one after the other, each over the whole text. The gates follow from the inputs and
the states before each step by matrix products, and an LSTM's cell state from its gates.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import log_softmax

from fastrnn.diagnostics.measures import gate_activations
from fastrnn.spec import BY_MODE, DirectionWeights

from .errors import TrainingError
from .model import CharRNN

#: names of the quantities of a layer, besides the gates that `gate_activations` names
HIDDEN = "h"
CELL = "c"


@dataclass(frozen=True)
class Activations:
    """The values of a model after each of the T characters of a text, float32 on the CPU.

    Attributes:
        layers: for each layer, its quantities by name, [T,H] each: the state ``h``, the cell state
            ``c`` of an LSTM, and the gates.
        log_probabilities: [T,V], of the character that follows, in nats.
    """

    layers: list[dict[str, Tensor]]
    log_probabilities: Tensor


@torch.no_grad()
def record(model: CharRNN, numbers: Tensor) -> Activations:
    """Runs a model over a text, from a state of zeros and without dropout.

    Args:
        model: the model. Its mode (training or evaluation) has no effect.
        numbers: int [T], the encoded text.

    Raises:
        TrainingError: a state is NaN or infinite.
    """
    x = model.embedding(numbers.long().to(model.decoder.weight.device))  # [T,E]
    layers = []
    for number in range(model.recurrent.num_layers):
        layer = _single_layer(model.recurrent, number)
        output, _ = layer(x.unsqueeze(1))
        h = output.squeeze(1)
        quantities = {HIDDEN: h, **_inner(layer, x, h)}
        layers.append({name: values.float().cpu() for name, values in quantities.items()})
        x = h
    if not all(values.isfinite().all() for layer in layers for values in layer.values()):
        raise TrainingError("the states of the model contain NaN or infinity; train it again")
    return Activations(layers, log_softmax(model.decoder(x).float().cpu(), dim=-1))


def _single_layer(stack: nn.RNNBase, number: int) -> nn.RNNBase:
    """Returns one layer of a stack as a module with copies of its weights."""
    weights = {
        f"{name}_l0": getattr(stack, f"{name}_l{number}")
        for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
    }
    options: dict[str, Any] = (
        {"nonlinearity": stack.nonlinearity} if stack.mode.startswith("RNN") else {}
    )
    layer: nn.RNNBase = type(stack)(weights["weight_ih_l0"].shape[1], stack.hidden_size, **options)
    layer.load_state_dict(weights)
    return layer.to(weights["weight_ih_l0"].device)


def _inner(layer: nn.RNNBase, x: Tensor, h: Tensor) -> dict[str, Tensor]:
    """Returns the cell state of an LSTM, and the gates of an LSTM or GRU, [T,H] each."""
    cell = BY_MODE[layer.mode].name
    before = torch.cat([torch.zeros_like(h[:1]), h[:-1]])
    [names] = layer.all_weights
    gates = gate_activations(cell, x, before, DirectionWeights(*names))
    gates.pop(HIDDEN, None)  # the only "gate" of an RNN is its state
    if cell != "lstm":
        return gates
    c = torch.zeros_like(h[0])
    cells = []
    for kept, added in zip(gates["f"], gates["i"] * gates["g"], strict=True):
        c = kept * c + added
        cells.append(c)
    return {CELL: torch.stack(cells), **gates}

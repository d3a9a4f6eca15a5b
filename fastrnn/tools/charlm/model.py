"""The character model: embedding -> recurrent layers -> linear decoder, at every step.

e_t = W_e[x_t]     h_t = cell(e_t, h_{t-1})     logits_t = W_d h_t + b_d
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .config import Config
from .errors import CharlmError

State = Tensor | tuple[Tensor, Tensor]  # h [L,B,H], for an LSTM (h, c)


def recurrent_layer(config: Config) -> nn.RNNBase:
    """Returns the recurrent layers of the configured backend, `fastrnn` or `torch.nn`.

    Only this function differs between the two backends.
    """
    module: Any
    if config.backend == "torch":
        module = nn
    else:
        import fastrnn

        module = fastrnn
    options: dict[str, Any] = {"num_layers": config.layers}
    if config.layers > 1:  # dropout acts between layers; torch warns about it for a single layer
        options["dropout"] = config.dropout
    if config.cell == "rnn":
        options["nonlinearity"] = config.nonlinearity
    layer: nn.RNNBase = getattr(module, config.cell.upper())(
        config.embedding_size, config.hidden, **options
    )
    return layer


class CharRNN(nn.Module):
    """Predicts the next character at every step of a sequence.

    Dropout acts between the recurrent layers and before the decoder.

    Args:
        vocabulary_size: V, number of symbols.
        config: sizes, layers, cell, backend and dropout.
    """

    def __init__(self, vocabulary_size: int, config: Config) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary_size, config.embedding_size)
        self.recurrent = recurrent_layer(config)
        self.dropout = nn.Dropout(config.dropout)
        self.decoder = nn.Linear(config.hidden, vocabulary_size)

    def forward(self, x: Tensor, state: State) -> tuple[Tensor, State]:
        """Returns the logits of the next character at every step.

        Args:
            x: int64 [T,B], characters.
            state: the state before the first step.

        Returns:
            logits [T,B,V] and the state after the last step.
        """
        output, state = self.recurrent(self.embedding(x), state)
        return self.decoder(self.dropout(output)), state

    def zero_state(self, batch_size: int) -> State:
        """Returns the state before the first character of a text: zeros."""
        weight = self.decoder.weight
        shape = (self.recurrent.num_layers, batch_size, self.recurrent.hidden_size)
        h = torch.zeros(shape, dtype=weight.dtype, device=weight.device)
        return (h, torch.zeros_like(h)) if self.recurrent.mode == "LSTM" else h


def check_device(device: str) -> None:
    """Checks that a device is available.

    Raises:
        CharlmError: the GPU does not exist, or this torch cannot use it.
    """
    if device == "cpu":
        return
    if not torch.cuda.is_available():
        reason = "sees no GPU" if torch.version.cuda else "is built for the CPU only"
        raise CharlmError(f"--device {device}: torch {torch.__version__} {reason}")
    index = torch.device(device).index or 0
    if index >= torch.cuda.device_count():
        raise CharlmError(
            f"--device {device}: the last GPU is cuda:{torch.cuda.device_count() - 1}"
        )


def build_model(vocabulary_size: int, config: Config) -> CharRNN:
    """Returns a model whose weights depend only on the seed and the sizes.

    They are the same for both backends and, because they are drawn on the CPU, on every device.
    The global random state is unchanged.
    """
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(config.seed)
        model = CharRNN(vocabulary_size, config)
    return model.to(config.device)


def parameter_count(model: nn.Module) -> int:
    """Returns the number of trainable values."""
    return sum(parameter.numel() for parameter in model.parameters())

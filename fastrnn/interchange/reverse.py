"""A layer that runs backwards in time only, which fastrnn's modules do not do by themselves."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fastrnn.engine.ragged import check_lengths
from fastrnn.modules.base import RecurrentBase


class Reversed(nn.Module):
    """Runs a layer of one direction from the last step to the first.

        module = fastrnn.Reversed(fastrnn.GRU(8, 16))
        output, h_n = module(input)

    output[t] is the state after the steps T-1, ..., t; h_n is the state after step 0. This is the
    reverse direction of a bidirectional layer.

    Args:
        layer: a `fastrnn.RNN`, `LSTM` or `GRU` with one direction.

    Inputs:
        input: [T,B,I], [B,T,I] with ``batch_first``, or unbatched [T,I].
        hx: as for the layer; zeros if omitted.
        lengths: integers [B], the number of steps of each row: a row starts at its own last step,
            and its output beyond is zero.

    Outputs:
        The layer's output and final states.

    Raises:
        TypeError: ``layer`` is not a fastrnn layer, ``input`` is not a tensor, or ``lengths`` are
            not integers.
        ValueError: the layer is bidirectional, or the shape or a value of ``lengths`` is wrong.
    """

    def __init__(self, layer: RecurrentBase) -> None:
        super().__init__()
        if not isinstance(layer, RecurrentBase):
            raise TypeError(
                f"Reversed: layer must be a fastrnn.RNN, LSTM or GRU, got {type(layer).__name__}."
            )
        if layer.bidirectional:
            raise ValueError("Reversed: layer must have one direction, got a bidirectional one.")
        self.layer = layer

    def forward(self, input: Tensor, hx: Any = None, lengths: Tensor | None = None) -> Any:
        """Runs the layer over ``input`` backwards; see the class for the shapes."""
        if not isinstance(input, Tensor):
            raise TypeError(f"Reversed: input must be a tensor, got {type(input).__name__}.")
        time = 1 if self.layer.batch_first and input.dim() == 3 else 0
        if lengths is None:
            output, state = self.layer(input.flip(time), hx)
            return output.flip(time), state
        # padding stays at the end: within its length, row b reads step lengths[b] - 1 - t at t
        if input.dim() != 3:
            raise ValueError(f"lengths needs input with 3 dimensions, got {input.dim()}")
        check_lengths(lengths, input.shape[1 - time])
        count = input.shape[time]
        steps = torch.arange(count, device=input.device)
        last = lengths.to(input.device, torch.int64).clamp(max=count).unsqueeze(1) - 1
        order = torch.where(steps <= last, last - steps, steps)  # [B,T]
        order = (order if time == 1 else order.t()).unsqueeze(-1)
        output, state = self.layer(torch.take_along_dim(input, order, time), hx, lengths)
        return torch.take_along_dim(output, order, time), state

"""The minimal gated unit over whole sequences."""

from typing import Any, overload

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from fastrnn.modules.rnn import without_projection
from fastrnn.modules.scripted import OneState

__all__ = ["MGU"]


class MGU(OneState):
    r"""Minimal gated unit: a GRU whose one gate serves for reset and update.

    .. math::
        \begin{aligned}
        f_t &= \sigma(W_{if} x_t + b_{if} + W_{hf} h_{t-1} + b_{hf}) \\
        n_t &= \tanh(W_{in} x_t + b_{in} + W_{hn} (f_t \odot h_{t-1}) + b_{hn}) \\
        h_t &= (1 - f_t) \odot h_{t-1} + f_t \odot n_t
        \end{aligned}

    Args:
        input_size: I, features of each input step.
        hidden_size: H, features of the hidden state.
        num_layers: L, number of stacked layers. Default: 1
        bias: whether there are ``b_ih`` and ``b_hh``. Default: ``True``
        batch_first: input and output are [B,T,*] instead of [T,B,*]; the states are not.
        dropout: probability that an output between two layers is zeroed in training. Default: 0
        bidirectional: whether a second direction runs backwards in time: D = 2 instead of 1.
        device, dtype: of the parameters.
        learn_initial_state, residual, batch_first_states, layer_norm, zoneout, recurrent_dropout,
            weight_dropout, heads: as in `fastrnn.GRU`. With ``layer_norm`` the products of f and
            of n are normalised separately.

    Inputs:
        input: [T,B,I], unbatched [T,I], or a `PackedSequence`.
        hx: [L*D,B,H] or unbatched [L*D,H]; zeros if omitted.
        lengths, resets, reset_state: as in `fastrnn.GRU`.

    Outputs:
        output: [T,B,D*H], [T,D*H] or a `PackedSequence`, the states of the last layer at each step.
        h_n: [L*D,B,H] or [L*D,H], the state after the last step of each sequence.

    Raises:
        ValueError, TypeError, RuntimeError: as in ``torch.nn.GRU``, with its messages.

    Parameters have the names of ``torch.nn.GRU``'s, with the gates f and n, and are drawn from the
    uniform distribution on ±1/sqrt(H).

    Source: G.-B. Zhou, J. Wu, C.-L. Zhang, Z.-H. Zhou, Minimal Gated Unit for Recurrent Neural
    Networks (2016).
    """

    _wrong_input_message = "MGU: Expected input to be 2D or 3D, got {}D instead"

    @overload
    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
        *,
        learn_initial_state: bool = False,
        residual: bool = False,
        batch_first_states: bool = False,
        layer_norm: bool = False,
        zoneout: float = 0.0,
        recurrent_dropout: float = 0.0,
        weight_dropout: float = 0.0,
        heads: int = 1,
    ) -> None: ...
    @overload
    def __init__(self, *args: Any, **kwargs: Any) -> None: ...
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__("MGU", *without_projection(args, kwargs), **kwargs)

    def forward(
        self,
        input: Tensor | PackedSequence,
        hx: Tensor | None = None,
        lengths: Tensor | None = None,
        resets: Tensor | None = None,
        reset_state: Tensor | None = None,
    ) -> Any:
        """Runs the network over ``input`` from the state ``hx``; see the class for the shapes."""
        return self._run(input, hx, lengths, resets, reset_state, False, False)

"""Recurrent networks as functions, with the signatures of ``torch._VF.lstm`` and its like.

Each function comes in two forms, told apart by their arguments:

    lstm(input, hx, params, has_biases, num_layers, dropout, train, bidirectional, batch_first)
    lstm(data, batch_sizes, hx, params, has_biases, num_layers, dropout, train, bidirectional)

The second takes the rows of a `torch.nn.utils.rnn.PackedSequence`.

Args:
    input: [T,B,I], or [B,T,I] with ``batch_first``.
    data: [N,I] packed rows, sorted by length.
    batch_sizes: int64 [T] on the CPU, the rows that are active at each step, descending.
    hx: initial hidden state [L*D,B,R]; for ``lstm`` a tuple or list of it and the cell state
        [L*D,B,H]. R is the size of an LSTM's projection, without one it is H.
    params: for each layer and direction w_ih [G*H,I], w_hh [G*H,R], with biases b_ih and b_hh
        [G*H], with a projection w_hr [R,H].
    has_biases: whether ``params`` holds biases.
    num_layers: L.
    dropout: probability of zeroing an output between two layers while ``train``.
    train: whether dropout acts.
    bidirectional: D = 2 directions, the second one backwards in time.
    batch_first: form of ``input`` and of the output, never of the states.
    weight_dtype: by keyword only. ``torch.float16`` lets the CPU hold w_hh in half the bytes where
        that is faster, see docs/float16_weights.md; None does not.

Returns:
    output [T,B,D*R] (or [B,T,D*R], or [N,D*R]) and the final states, shaped like the initial ones.

Raises:
    RuntimeError: shapes, dtypes or devices that do not fit together.
    ValueError: ``weight_dtype`` is something else.

Differs from torch: every shape is checked first and named in the message; tensors of different
floating types work under autocast on every device; the backward pass works in eval mode; results
are deterministic.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol, overload

import torch
from torch import Tensor

from fastrnn.checks import check_weight_dtype as check_weight_dtype
from fastrnn.engine.arguments import run_one_state, run_two_states
from fastrnn.spec import CELLS

__all__ = ["gru", "lstm", "rnn_relu", "rnn_sigmoid", "rnn_tanh"]


class OneStateFunction(Protocol):
    """A function of one state in its two forms."""

    @overload
    def __call__(
        self,
        input: Tensor,
        hx: Tensor,
        params: Sequence[Tensor],
        has_biases: bool,
        num_layers: int,
        dropout: float,
        train: bool,
        bidirectional: bool,
        batch_first: bool,
        *,
        weight_dtype: torch.dtype | None = None,
    ) -> tuple[Tensor, Tensor]: ...
    @overload
    def __call__(
        self,
        data: Tensor,
        batch_sizes: Tensor,
        hx: Tensor,
        params: Sequence[Tensor],
        has_biases: bool,
        num_layers: int,
        dropout: float,
        train: bool,
        bidirectional: bool,
        *,
        weight_dtype: torch.dtype | None = None,
    ) -> tuple[Tensor, Tensor]: ...


class TwoStatesFunction(Protocol):
    """A function of the states h and c in its two forms."""

    @overload
    def __call__(
        self,
        input: Tensor,
        hx: Sequence[Tensor],
        params: Sequence[Tensor],
        has_biases: bool,
        num_layers: int,
        dropout: float,
        train: bool,
        bidirectional: bool,
        batch_first: bool,
        *,
        weight_dtype: torch.dtype | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]: ...
    @overload
    def __call__(
        self,
        data: Tensor,
        batch_sizes: Tensor,
        hx: Sequence[Tensor],
        params: Sequence[Tensor],
        has_biases: bool,
        num_layers: int,
        dropout: float,
        train: bool,
        bidirectional: bool,
        *,
        weight_dtype: torch.dtype | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]: ...


def _one_state_forms(function: Callable[..., tuple[Tensor, Tensor]]) -> OneStateFunction:
    """The same function, with the types of both forms."""
    return function


def _two_state_forms(function: Callable[..., tuple[Tensor, Tensor, Tensor]]) -> TwoStatesFunction:
    """The same function, with the types of both forms."""
    return function


@_one_state_forms
def rnn_tanh(*args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
    """Elman's network.

        h' = tanh(W_ih x + b_ih + W_hh h + b_hh)

    Arguments, results and errors: see the module.
    Source: J. L. Elman, Finding Structure in Time, Cognitive Science 14 (1990).
    """
    return run_one_state(CELLS["rnn_tanh"], args, kwargs)


@_one_state_forms
def rnn_relu(*args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
    """Elman's network with ReLU.

        h' = max(0, W_ih x + b_ih + W_hh h + b_hh)

    Arguments, results and errors: see the module.
    Source: Q. V. Le, N. Jaitly, G. E. Hinton, A Simple Way to Initialize Recurrent Networks of
    Rectified Linear Units (2015).
    """
    return run_one_state(CELLS["rnn_relu"], args, kwargs)


@_one_state_forms
def rnn_sigmoid(*args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
    """Elman's network with the logistic function, which torch lacks.

        h' = sigmoid(W_ih x + b_ih + W_hh h + b_hh)

    Arguments, results and errors: see the module.
    Source: J. L. Elman, Finding Structure in Time, Cognitive Science 14 (1990).
    """
    return run_one_state(CELLS["rnn_sigmoid"], args, kwargs)


@_one_state_forms
def gru(*args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
    """Gated recurrent unit, with the reset gate after the recurrent product as in torch and cuDNN.

        r = sigmoid(W_ir x + b_ir + W_hr h + b_hr)
        z = sigmoid(W_iz x + b_iz + W_hz h + b_hz)
        n = tanh(W_in x + b_in + r*(W_hn h + b_hn))
        h' = (1-z)*n + z*h

    Arguments, results and errors: see the module.
    Source: K. Cho et al., Learning Phrase Representations using RNN Encoder-Decoder (2014).
    """
    return run_one_state(CELLS["gru"], args, kwargs)


@_two_state_forms
def lstm(*args: Any, **kwargs: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Long short-term memory, optionally with a projection.

        i = sigmoid(W_ii x + b_ii + W_hi h + b_hi)    f = sigmoid(W_if x + b_if + W_hf h + b_hf)
        g = tanh(W_ig x + b_ig + W_hg h + b_hg)       o = sigmoid(W_io x + b_io + W_ho h + b_ho)
        c' = f*c + i*g
        h' = o*tanh(c'), with a projection W_hr (o*tanh(c'))

    Arguments, results and errors: see the module. Returns output, h_n, c_n.
    Source: S. Hochreiter, J. Schmidhuber, Long Short-Term Memory (1997); F. A. Gers,
    J. Schmidhuber, F. Cummins, Learning to Forget (2000); projection: H. Sak, A. Senior,
    F. Beaufays, Long Short-Term Memory Based Recurrent Neural Network Architectures (2014).
    """
    return run_two_states(CELLS["lstm"], args, kwargs)

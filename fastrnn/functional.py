"""Recurrent networks as functions, with the signatures of ``torch._VF.lstm`` and similar functions.

`linear_scan`, a recurrence without a product, has arguments of its own. Each other function can be
called in two forms:

    lstm(input, hx, params, has_biases, num_layers, dropout, train, bidirectional, batch_first)
    lstm(data, batch_sizes, hx, params, has_biases, num_layers, dropout, train, bidirectional)

The second takes the rows of a `torch.nn.utils.rnn.PackedSequence`.

Args:
    input: [T,B,I], or [B,T,I] with ``batch_first``.
    data: [N,I] packed rows, sorted by length.
    batch_sizes: int64 [T] on the CPU, the number of active rows at each step, descending.
    hx: initial hidden state [L*D,B,R]; for ``lstm`` a tuple or list of the hidden state and the
        cell state [L*D,B,H]. R is the size of an LSTM's projection; without a projection R is H.
    params: for each layer and direction w_ih [G*H,I] and w_hh [G*H,R], then b_ih and b_hh [G*H] if
        there are biases, then w_hr [R,H] if there is a projection. G is 1 for an RNN, 3 for a GRU
        and 4 for an LSTM; I of an upper layer is D*R.
    has_biases: whether ``params`` holds biases.
    num_layers: L.
    dropout: probability that an output between two layers is zeroed if ``train`` is true.
    train: whether dropout is applied.
    bidirectional: D = 2 directions, the second one backwards in time.
    batch_first: whether ``input`` and the output are [B,T,*] instead of [T,B,*]; the states never
        are.
    weight_dtype: keyword only. ``torch.float16`` lets the CPU kernels hold w_hh in float16 where
        that is faster, see docs/float16_weights.md. Default: None
    recompute: keyword only. ``"full"`` or a number of steps saves memory in training, see
        docs/memory.md. Default: ``"none"``
    residual: keyword only. Whether each layer but the first adds its input to its output, see
        `fastrnn.LSTM`. Default: False
    lengths, resets, reset_state: keyword only, of the first form; see `fastrnn.LSTM`.
    return_all_states, return_gates: keyword only. If one is true, a `fastrnn.Extras` is the last
        result.

Returns:
    output [T,B,D*R] (or [B,T,D*R], or [N,D*R]) and the final states, shaped like the initial ones.

Raises:
    TypeError: an argument is missing, unknown or of the wrong type.
    RuntimeError: shapes, dtypes or devices do not fit together.
    ValueError: ``num_layers``, ``dropout``, ``weight_dtype`` or ``recompute`` has an invalid value.

Differences from torch: every shape is checked first and named in the message; tensors of different
floating-point types work under autocast on every device; the backward pass works in eval mode;
results are deterministic.

>>> import torch
>>> x, h0 = torch.randn(5, 3, 10), torch.zeros(1, 3, 20)
>>> params = [torch.randn(60, 10), torch.randn(60, 20), torch.randn(60), torch.randn(60)]
>>> output, h_n = gru(x, h0, params, True, 1, 0.0, False, False, False)
>>> output.shape, h_n.shape
(torch.Size([5, 3, 20]), torch.Size([1, 3, 20]))
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol, overload

import torch
from torch import Tensor

from fastrnn import autocast
from fastrnn.checks import check_weight_dtype as check_weight_dtype
from fastrnn.checks import describe
from fastrnn.engine.arguments import run_one_state, run_two_states
from fastrnn.ops import DTYPES, scan
from fastrnn.spec import CELLS
from fastrnn.tracing import without_tracing

__all__ = ["gru", "linear_scan", "lstm", "rnn_relu", "rnn_sigmoid", "rnn_tanh"]


class OneStateFunction(Protocol):
    """A function with one state, in both forms."""

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
        residual: bool = False,
        recompute: int | str = "none",
        lengths: Tensor | None = None,
        resets: Tensor | None = None,
        reset_state: Tensor | None = None,
        return_all_states: bool = False,
        return_gates: bool = False,
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
        residual: bool = False,
        return_all_states: bool = False,
        return_gates: bool = False,
        recompute: int | str = "none",
    ) -> tuple[Tensor, Tensor]: ...


class TwoStatesFunction(Protocol):
    """A function with the states h and c, in both forms."""

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
        residual: bool = False,
        recompute: int | str = "none",
        lengths: Tensor | None = None,
        resets: Tensor | None = None,
        reset_state: Sequence[Tensor] | None = None,
        return_all_states: bool = False,
        return_gates: bool = False,
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
        residual: bool = False,
        return_all_states: bool = False,
        return_gates: bool = False,
        recompute: int | str = "none",
    ) -> tuple[Tensor, Tensor, Tensor]: ...


def _one_state_forms(function: Callable[..., tuple[Tensor, Tensor]]) -> OneStateFunction:
    """Returns the function itself, typed with both forms."""
    return function


def _two_state_forms(function: Callable[..., tuple[Tensor, Tensor, Tensor]]) -> TwoStatesFunction:
    """Returns the function itself, typed with both forms."""
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
    """Elman's network with the logistic sigmoid, which torch does not have.

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


def linear_scan(a: Tensor, b: Tensor, h0: Tensor | None = None, *, reverse: bool = False) -> Tensor:
    """The recurrence that is linear in its state, elementwise.

        h_t = a_t * h_{t-1} + b_t

    Args:
        a, b: [T,B,H], or [T,*] with any number of further dimensions; of the same shape. float16,
            bfloat16, float32 or float64; half types are computed in float32, states included.
        h0: the state before the first step, [B,H] (or [*]); zeros if omitted.
        reverse: keyword only. Runs from the last step to the first: h_t = a_t * h_{t+1} + b_t, and
            h0 is the state after the last step.

    Returns:
        h [T,B,H], the states of all steps. The final state is ``h[-1]``, or ``h[0]`` if reversed.

    Raises:
        TypeError: an argument is not a tensor, or ``reverse`` is not a bool.
        RuntimeError: shapes, dtypes or devices do not fit together, or a tensor is not dense.

    Derivatives of every order, forward mode and vmap run by the same kernels. Under autocast the
    arguments are cast to the widest of their types.

    >>> import torch
    >>> linear_scan(torch.full((4, 1, 1), 0.5), torch.ones(4, 1, 1)).flatten()
    tensor([1.0000, 1.5000, 1.7500, 1.8750])
    """
    for name, value in (("a", a), ("b", b), ("h0", h0)):
        if not isinstance(value, Tensor) and not (name == "h0" and value is None):
            raise TypeError(f"linear_scan: {name} must be a tensor, got {describe(value)}.")
    if not isinstance(reverse, bool):
        raise TypeError(f"linear_scan: reverse must be a bool, got {describe(reverse)}.")
    if autocast.acts_on(a):
        dtype = torch.promote_types(a.dtype, b.dtype)
        if h0 is not None:
            dtype = torch.promote_types(dtype, h0.dtype)
        a, b, h0 = a.to(dtype), b.to(dtype), None if h0 is None else h0.to(dtype)
    if a.dtype not in DTYPES:
        expected = "float16, bfloat16, float32 or float64"
        raise RuntimeError(f"linear_scan: a must be {expected}, got {a.dtype}.")
    if a.dim() == 0:
        raise RuntimeError("linear_scan: a must have a dimension of steps, got a scalar.")
    without_tracing(_check_scan_argument, "b", b, a)
    if h0 is not None:
        without_tracing(_check_scan_argument, "h0", h0, a)
    return scan(a, b, h0, reverse)


def _check_scan_argument(name: str, t: Tensor, a: Tensor) -> None:
    shape = a.shape if name == "b" else a.shape[1:]
    if t.shape != shape:
        raise RuntimeError(
            f"linear_scan: {name} must have the shape {list(shape)}, got {list(t.shape)}."
        )
    if t.dtype != a.dtype:
        raise RuntimeError(f"linear_scan: {name} must have the dtype {a.dtype}, got {t.dtype}.")
    if t.device != a.device:
        raise RuntimeError(f"linear_scan: {name} must be on {a.device}, got {t.device}.")

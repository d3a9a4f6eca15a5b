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
        that is faster, see `check_weight_dtype`; None does not.

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

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, cast, overload

import torch
from torch import Tensor
from torch.autograd import forward_ad

from fastrnn import autocast, checks, onnx_nodes, ops, reference
from fastrnn.spec import CELLS, CellSpec, split_weights
from fastrnn.tracing import is_in_onnx_export, is_tracing, is_written_down, size, unrecorded

__all__ = ["gru", "lstm", "rnn_relu", "rnn_sigmoid", "rnn_tanh"]


@overload
def rnn_tanh(
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
def rnn_tanh(
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
def rnn_tanh(*args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
    """Elman's network.

        h' = tanh(W_ih x + b_ih + W_hh h + b_hh)

    Arguments, results and errors: see the module.
    Source: J. L. Elman, Finding Structure in Time, Cognitive Science 14 (1990).
    """
    return _one_state(CELLS["rnn_tanh"], args, kwargs)


@overload
def rnn_relu(
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
def rnn_relu(
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
def rnn_relu(*args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
    """Elman's network with ReLU.

        h' = max(0, W_ih x + b_ih + W_hh h + b_hh)

    Arguments, results and errors: see the module.
    Source: Q. V. Le, N. Jaitly, G. E. Hinton, A Simple Way to Initialize Recurrent Networks of
    Rectified Linear Units (2015).
    """
    return _one_state(CELLS["rnn_relu"], args, kwargs)


@overload
def rnn_sigmoid(
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
def rnn_sigmoid(
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
def rnn_sigmoid(*args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
    """Elman's network with the logistic function, which torch lacks.

        h' = sigmoid(W_ih x + b_ih + W_hh h + b_hh)

    Arguments, results and errors: see the module.
    Source: J. L. Elman, Finding Structure in Time, Cognitive Science 14 (1990).
    """
    return _one_state(CELLS["rnn_sigmoid"], args, kwargs)


@overload
def gru(
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
def gru(
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
def gru(*args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
    """Gated recurrent unit, with the reset gate after the recurrent product as in torch and cuDNN.

        r = sigmoid(W_ir x + b_ir + W_hr h + b_hr)
        z = sigmoid(W_iz x + b_iz + W_hz h + b_hz)
        n = tanh(W_in x + b_in + r*(W_hn h + b_hn))
        h' = (1-z)*n + z*h

    Arguments, results and errors: see the module.
    Source: K. Cho et al., Learning Phrase Representations using RNN Encoder-Decoder (2014).
    """
    return _one_state(CELLS["gru"], args, kwargs)


@overload
def lstm(
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
def lstm(
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
    spec = CELLS["lstm"]
    values = _arguments(spec, args, kwargs)
    hx = values["hx"]
    try:
        if not isinstance(hx, (tuple, list)):
            raise TypeError("lstm: hx must be a tuple of two tensors, h and c")
        if len(hx) != 2:
            raise RuntimeError("lstm expects two hidden states")
        h0, c0 = hx
        result = _checked_run(spec, c0, {**values, "hx": h0})
    except Exception:
        checks.explain_function(spec, values)
        raise
    return cast("tuple[Tensor, Tensor, Tensor]", result)


_PADDED = (
    "input",
    "hx",
    "params",
    "has_biases",
    "num_layers",
    "dropout",
    "train",
    "bidirectional",
    "batch_first",
)
_PACKED = ("data", "batch_sizes", *_PADDED[1:-1])


def _arguments(spec: CellSpec, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Gives the arguments of either form their names; "input" stands for "data" as well."""
    packed = False
    if len(args) > 2 and isinstance(args[1], Tensor):
        packed = (
            # no state has a dtype like that of batch_sizes
            (args[1].dim() == 1 and not (args[1].is_floating_point() or args[1].is_complex()))
            or (not spec.has_cell_state and isinstance(args[2], Tensor))
            or (spec.has_cell_state and isinstance(args[0], Tensor) and args[0].dim() == 2)
        )
    names = _PACKED if packed or "data" in kwargs or "batch_sizes" in kwargs else _PADDED
    if len(args) > len(names):
        raise TypeError(f"{spec.name}() takes {len(names)} arguments but {len(args)} were given")
    values = dict(zip(names, args, strict=False))
    for name, value in kwargs.items():
        if name not in names and name != "weight_dtype":
            raise TypeError(f"{spec.name}() got an unexpected argument '{name}'")
        if name in values:
            raise TypeError(f"{spec.name}() got several values for argument '{name}'")
        values[name] = value
    missing = [name for name in names if name not in values]
    if missing:
        raise TypeError(f"{spec.name}() misses the arguments {', '.join(missing)}")
    if "data" in values:
        values["input"] = values.pop("data")
    return {"batch_sizes": None, "batch_first": False, "weight_dtype": None, **values}


def _one_state(
    spec: CellSpec, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[Tensor, Tensor]:
    values = _arguments(spec, args, kwargs)
    try:
        output, h_n, _ = _checked_run(spec, None, values)
    except Exception:
        checks.explain_function(spec, values)
        raise
    return output, h_n


def _checked_run(
    spec: CellSpec, cx: Tensor | None, values: dict[str, Any]
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Checks every shape, which `run` leaves to its callers, and runs."""
    checks.check_options(spec, values)
    x: Tensor = values["input"]
    hx: Tensor = values["hx"]
    params: Sequence[Tensor] = list(values["params"])
    batch_sizes: Tensor | None = values["batch_sizes"]
    num_layers: int = values["num_layers"]
    directions = 2 if values["bidirectional"] else 1
    half_weights = check_weight_dtype(values["weight_dtype"]) is not None
    if batch_sizes is None:
        _expect(x.dim() == 3, f"input must have 3 dimensions, got {x.dim()}")
        batch = x.shape[0] if values["batch_first"] else x.shape[1]
    else:
        _expect(x.dim() == 2, f"packed data must have 2 dimensions, got {x.dim()}")
        _expect(
            batch_sizes.dim() == 1
            and batch_sizes.dtype == torch.int64
            and batch_sizes.device.type == "cpu",
            "batch_sizes must be an int64 vector on the CPU, got "
            f"{batch_sizes.dim()}-D {batch_sizes.dtype} on {batch_sizes.device}",
        )
        sizes = batch_sizes.tolist()
        _expect(len(sizes) > 0, "Expected sequence length to be larger than 0 in RNN")
        _expect(
            sum(sizes) == x.shape[0] and sizes == sorted(sizes, reverse=True) and sizes[-1] > 0,
            f"batch_sizes must be positive, descend and add up to the {x.shape[0]} rows of data",
        )
        batch = sizes[0]
    states = num_layers * directions
    for name, state in (("hidden", hx), ("cell", cx)):
        _expect(
            state is None
            or (state.dim() == 3 and state.shape[0] == states and state.shape[1] == batch),
            f"{name} state must be of size ({states}, {batch}, *), "
            f"got {None if state is None else list(state.shape)}",
        )
    size = hx.shape[2]
    hidden = size if cx is None else cx.shape[2]
    shapes: list[tuple[int, ...]] = []
    for index in range(states):
        width = x.shape[-1] if index < directions else size * directions
        shapes += [(spec.gates * hidden, width), (spec.gates * hidden, size)]
        if values["has_biases"]:
            shapes += [(spec.gates * hidden,)] * 2
        if size != hidden:
            shapes.append((size, hidden))
    _expect(
        len(params) == len(shapes), f"Expected {len(shapes)} parameter tensors, got {len(params)}"
    )
    for index, (param, shape) in enumerate(zip(params, shapes, strict=True)):
        _expect(
            tuple(param.shape) == shape,
            f"Expected params[{index}] of size {shape}, got {list(param.shape)}",
        )
    return run(
        spec,
        x,
        batch_sizes,
        hx,
        cx,
        params,
        num_layers,
        values["dropout"] if values["train"] else 0.0,
        values["batch_first"],
        half_weights,
    )


def check_weight_dtype(weight_dtype: torch.dtype | None) -> torch.dtype | None:
    """Returns ``weight_dtype``, how the kernels may hold w_hh: None or ``torch.float16``.

    float16 is for inference of one sequence on the CPU, where a step waits for w_hh from the cache:
    half the bytes arrive sooner. How many times as fast a layer of 100 steps with I = H is on an
    AMD EPYC (Zen 4), input product and packing included:

        H             128          256          512          1024
        one thread    1.2 - 1.3    1.3 - 1.4    1.3 - 1.45   1.35 - 1.65
        two threads   1.0 - 1.2    1.15 - 1.3   1.3          1.3 - 1.5      (least for an RNN)

    The kernels round w_hh, and nothing else, to

        w' = w (1 + d), |d| <= 2^-11, where 2^-14 <= |w| <= 65504
        |w' - w| <= 2^-25 for smaller ones; finite values beyond +-65504 become +-65504

    and add in float32. The parameters stay as they are.

    It acts where all of this holds, and `fastrnn._C.plan` tells: no gradient is recorded; tensors
    are float32 on the CPU; there is one sequence, of 24 steps or more; w_hh holds 16384 values or
    more (H of 128 for an RNN, 74 for a GRU, 64 for an LSTM); the CPU has AVX2 and F16C, or AVX-512.
    Any other call computes with w_hh as it is, which is more exact.

    What it costs: a pre-activation, a sum over k of w_k h_k, moves by

        at most 2^-11 sum |w_k h_k| + 2^-25 sum |h_k|,    as a rule 2^-12 sqrt(sum (w_k h_k)^2).

    With torch's initial weights that is a matter of neither H nor T. Of one layer, the largest
    change of an output relative to the largest output, for H = 128 ... 1024 and T = 24 ... 10000:
    3e-4 (RNN with tanh), 1e-4 (ReLU, sigmoid, GRU), 8e-5 (LSTM); expect less than 2^-10. It grows
    with the weights: by 5 to 6 times with w_hh twice as large for an RNN, by 2 to 3 for GRU and
    LSTM. A recurrence that amplifies (tanh from 3 times the initial w_hh on) does so with any
    rounding, until nothing is left to compare.

    Raises:
        ValueError: it is something else.
    """
    if weight_dtype is None or weight_dtype is torch.float16:
        return weight_dtype
    raise ValueError(
        f"weight_dtype must be None or torch.float16, got {checks.describe(weight_dtype)}"
    )


def _expect(condition: bool, message: str) -> None:
    if not condition:
        raise RuntimeError(message)


def run(
    spec: CellSpec,
    x: Tensor,
    batch_sizes: Tensor | None,
    h0: Tensor,
    c0: Tensor | None,
    params: Sequence[Tensor],
    num_layers: int,
    dropout: float,
    batch_first: bool = False,
    half_weights: bool = False,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Runs a stack of layers whose shapes the caller vouches for, by the best way there is.

    Arguments and results are those of `fastrnn.reference.forward`, save that x and y are [B,T,*]
    with ``batch_first``. ``half_weights``: as `fastrnn.ops.layer` has it. Raises RuntimeError if
    dtypes or devices do not fit.
    """
    under_autocast = autocast.acts_on(x)
    options = (num_layers, dropout, batch_first, half_weights)
    if (
        batch_sizes is None
        and (under_autocast or x.dtype in ops.HALF)
        and _torch_computes_single_step(spec, x, h0, c0, params, batch_first)
    ):
        # with autocast as it is: torch keeps the weights that it casts until autocast ends
        y, h_n, c_n = reference.forward(
            x.transpose(0, 1) if batch_first else x,
            h0,
            c0,
            params,
            None,
            spec,
            num_layers,
            dropout,
            _torch_step_layer,
        )
        if under_autocast:
            y, h_n, c_n = autocast.cast_results(spec, x, h0, c0, y, h_n, c_n)
        return y.transpose(0, 1) if batch_first else y, h_n, c_n
    if not under_autocast:
        return _run_alike(spec, x, batch_sizes, h0, c0, params, *options)
    alike = autocast.cast_arguments(x, h0, c0, params)
    with _without_autocast_in_graphs(x):
        results = _run_alike(
            spec, alike.x, batch_sizes, alike.h0, alike.c0, alike.weights, *options
        )
    return autocast.cast_results(spec, x, h0, c0, *results)


def _without_autocast_in_graphs(x: Tensor) -> AbstractContextManager[object]:
    """Disables autocast where an operator with rules of its own for it enters a graph."""
    if torch.compiler.is_compiling() or is_written_down():
        return torch.autocast(x.device.type, enabled=False)
    return nullcontext()


def _run_alike(
    spec: CellSpec,
    x: Tensor,
    batch_sizes: Tensor | None,
    h0: Tensor,
    c0: Tensor | None,
    params: Sequence[Tensor],
    num_layers: int,
    dropout: float,
    batch_first: bool,
    half_weights: bool,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """`run` on tensors that must be alike in dtype and device."""
    _check_alike(x, h0, c0, params)
    if batch_sizes is None and size(x, 1 if batch_first else 0) == 0:
        raise RuntimeError("Expected sequence length to be larger than 0 in RNN")
    layer = _route(x)
    if layer is None and spec.name != "rnn_sigmoid":
        return _native(spec, x, batch_sizes, h0, c0, params, num_layers, dropout, batch_first)
    if is_written_down():
        layer = _written(spec)
        if layer in (None, onnx_nodes.layer) and c0 is not None:
            onnx_nodes.check_projection(size(h0, -1), size(c0, -1))
        if layer is None:
            return _native(spec, x, batch_sizes, h0, c0, params, num_layers, dropout, batch_first)
    elif half_weights and layer is ops.layer:
        layer = ops.half_weights_layer
    elif (
        layer is ops.layer
        and num_layers == h0.shape[0] > 1
        and dropout == 0
        and ops.can_stack(x, h0, c0, params)
    ):
        y, h_n, c_n = ops.stack(
            x.transpose(0, 1) if batch_first else x, h0, c0, params, batch_sizes, spec
        )
        return y.transpose(0, 1) if batch_first else y, h_n, c_n
    y, h_n, c_n = reference.forward(
        x.transpose(0, 1) if batch_first else x,
        h0,
        c0,
        params,
        batch_sizes,
        spec,
        num_layers,
        dropout,
        layer or ops.composite,
    )
    return y.transpose(0, 1) if batch_first else y, h_n, c_n


#: The work of a step is B times the values of w_ih and w_hh. An RNN's step is torch's own up to the
#: first bound (and always where a gradient is recorded), a gated cell's in a half type up to the
#: second, every step in a half type or under autocast above the third. Measured on an AMD EPYC
#: (Zen 5).
_SMALL_RNN_STEP = 1 << 15
_SMALL_HALF_STEP = 1 << 11
_LARGE_HALF_STEP = 1 << 18


def torch_computes_half_step(spec: CellSpec, batch: int, params: Sequence[Tensor]) -> bool:
    """Whether torch's own operators compute one step on the CPU in a half type or under autocast.

    torch multiplies half types as they are, and keeps the weights that it casts until autocast
    ends; the kernels would widen half types at each step.
    """
    if spec.torch_step is None:
        return False
    work = batch * (params[0].numel() + params[1].numel())
    if work > _LARGE_HALF_STEP:
        return True
    if spec.gates == 1:
        return work <= _SMALL_RNN_STEP
    return params[0].dtype in ops.HALF and work <= _SMALL_HALF_STEP


def _torch_computes_step(
    spec: CellSpec, x: Tensor, h: Tensor, c: Tensor | None, params: Sequence[Tensor]
) -> bool:
    """Whether torch's own operators compute one step: x [B,I], h and c [B,H].

    In a half type and under autocast `torch_computes_half_step` has the rule; on other devices than
    the CPU autocast has torch compute all steps. Otherwise it is an RNN on the CPU that is to be
    differentiated, which torch does in C++, in less time than it takes to enter Python twice for a
    kernel's gradient, or a small one.
    """
    if spec.torch_step is None or torch._C._are_functorch_transforms_active() or is_written_down():
        return False
    is_cpu = x.device.type == "cpu"
    if autocast.acts_on(x):
        return not is_cpu or torch_computes_half_step(spec, x.shape[0], params)
    if not is_cpu:
        return False
    if x.dtype in ops.HALF:
        return torch_computes_half_step(spec, x.shape[0], params)
    return spec.gates == 1 and (
        ops.records(x, h, None, params)
        or x.shape[0] * (params[0].numel() + params[1].numel()) <= _SMALL_RNN_STEP
    )


def _torch_computes_single_step(
    spec: CellSpec,
    x: Tensor,
    h0: Tensor,
    c0: Tensor | None,
    params: Sequence[Tensor],
    batch_first: bool,
) -> bool:
    """Whether a layer in a half type or under autocast is a single step that torch computes."""
    return (
        not torch.compiler.is_compiling()
        and not is_written_down()
        and x.shape[1 if batch_first else 0] == 1
        and x.device.type == "cpu"
        and (c0 is None or c0.shape == h0.shape)  # no projection
        and not torch._C._are_functorch_transforms_active()
        and torch_computes_half_step(spec, x.shape[0 if batch_first else 1], params)
    )


def _torch_step_layer(
    x: Tensor,
    h0: Tensor,
    c0: Tensor | None,
    weights: Sequence[Tensor],
    batch_sizes: Tensor | None,
    spec: CellSpec,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """One layer of a single step by torch. Arguments and results: `fastrnn.reference.layer`."""
    steps: list[Any] = []
    step: Any = spec.torch_step
    for direction, w in enumerate(split_weights(weights, h0.shape[0])):
        h = h0[direction]
        state = h if c0 is None else (h, c0[direction])
        steps.append(step(x[0], state, w.w_ih, w.w_hh, w.b_ih, w.b_hh))
    h_n, c_n = (steps, None) if c0 is None else zip(*steps, strict=True)
    y = h_n[0] if len(steps) == 1 else torch.cat(h_n, -1)
    return y.unsqueeze(0), torch.stack(h_n), None if c_n is None else torch.stack(c_n)


def _torch_step(
    spec: CellSpec, x: Tensor, h: Tensor, c: Tensor | None, params: Sequence[Tensor]
) -> tuple[Tensor, Tensor | None] | None:
    """One step by torch, or None where the kernels are to compute it.

    What torch refuses is left to `run_cell`, which says why.
    """
    if not _torch_computes_step(spec, x, h, c, params):
        return None
    step: Any = spec.torch_step
    try:
        if c is None:
            return step(x, h, *params), None
        h_next, c_next = step(x, (h, c), *params)
    except RuntimeError:
        return None
    return h_next, c_next


def run_cell(
    spec: CellSpec, x: Tensor, h: Tensor, c: Tensor | None, params: Sequence[Tensor]
) -> tuple[Tensor, Tensor | None]:
    """One step of one layer: x [B,I], h and c [B,H] give the next h and c (None but for an LSTM).

    Raises RuntimeError with torch's own words if sizes, dtypes or devices do not fit.
    """
    if spec.gates == 1 or x.dtype in ops.HALF or torch._C._is_any_autocast_enabled():
        by_torch = _torch_step(spec, x, h, c, params)
        if by_torch is not None:
            return by_torch
    unrecorded(_check_cell, x, h, c, params)
    if autocast.acts_on(x):
        alike = autocast.cast_arguments(x, h, c, params)
        with _without_autocast_in_graphs(x):
            h_n, c_n = _run_cell_alike(spec, alike.x, alike.h0, alike.c0, alike.weights)
        _, h_n, c_n = autocast.cast_results(spec, x, h, c, h_n, h_n, c_n)
        return h_n, c_n
    return _run_cell_alike(spec, x, h, c, params)


def _run_cell_alike(
    spec: CellSpec, x: Tensor, h: Tensor, c: Tensor | None, params: Sequence[Tensor]
) -> tuple[Tensor, Tensor | None]:
    """`run_cell` on tensors that must be alike in dtype and device."""
    _check_alike(x, h, c, params)
    layer = ops.layer if size(h, 1) > 0 and _route(x) is ops.layer else ops.composite
    if layer is ops.layer and is_written_down():
        # ONNX has no cells, but all that a step is made of
        layer = ops.composite if is_in_onnx_export() else ops.written_layer
    _, h_n, c_n = layer(x, h, c, params, None, spec)
    return h_n, c_n


def _check_cell(x: Tensor, h: Tensor, c: Tensor | None, params: Sequence[Tensor]) -> None:
    batch = x.shape[0]
    input_size, hidden_size = params[0].shape[1], params[1].shape[1]
    if x.shape[1] != input_size:
        raise RuntimeError(
            f"input has inconsistent input_size: got {x.shape[1]} expected {input_size}"
        )
    for index, state in enumerate((h, c)):
        if state is None:
            continue
        if state.dim() != 2:
            raise RuntimeError(f"hidden{index} should be 2D like a batched input, got 1D")
        if state.shape[0] != batch:
            raise RuntimeError(
                f"Input batch size {batch} doesn't match hidden{index} batch size {state.shape[0]}"
            )
        if state.shape[1] != hidden_size:
            raise RuntimeError(
                f"hidden{index} has inconsistent hidden_size: "
                f"got {state.shape[1]}, expected {hidden_size}"
            )


def _check_alike(x: Tensor, h0: Tensor, c0: Tensor | None, params: Sequence[Tensor]) -> None:
    """All tensors must have the dtype and the device of the input."""
    dtype, device = x.dtype, x.device
    for w in params:
        if w.dtype != dtype or w.device != device:
            _complain(x, w, "parameter")
    if h0.dtype != dtype or h0.device != device:
        _complain(x, h0, "hidden")
    if c0 is not None and (c0.dtype != dtype or c0.device != device):
        _complain(x, c0, "hidden")


def _complain(x: Tensor, other: Tensor, role: str) -> None:
    if x.device != other.device:
        raise RuntimeError(
            f"Input and {role} tensors are not at the same device, found input tensor at "
            f"{x.device} and {role} tensor at {other.device}"
        )
    raise RuntimeError(
        f"Input and {role} tensors are not the same dtype, found input tensor with {x.dtype} "
        f"and {role} tensor with {other.dtype}"
    )


def _route(x: Tensor) -> reference.Layer | None:
    """What computes a layer: the kernels, the composite of torch operations, or None for torch.

    The kernels know neither tangents nor batched tensors of ``torch.func``; the composite does.
    """
    if torch._C._are_functorch_transforms_active():
        # Dynamo does not see that what a transform has wrapped requires a gradient
        if torch.compiler.is_compiling() or not _only_reverse_mode():
            return ops.composite
    elif forward_ad._current_level >= 0:
        return ops.composite
    if x.device.type in ops.DEVICES and x.dtype in ops.DTYPES:
        return ops.layer
    return None


def _written(spec: CellSpec) -> reference.Layer | None:
    """As `_route`, where the call is written down (`tracing.is_written_down`).

    For ONNX a layer is a node of its own; the older exporter makes that of torch's operators only.
    """
    if not is_in_onnx_export():
        return ops.written_layer
    if not is_tracing():
        return onnx_nodes.layer
    if spec.name == "rnn_sigmoid":
        raise RuntimeError("torch.onnx.export: an RNN with 'sigmoid' needs dynamo=True")
    return None


def _only_reverse_mode() -> bool:
    functorch = torch._C._functorch
    stack = functorch.get_interpreter_stack() or []
    return all(interpreter.key() == functorch.TransformType.Grad for interpreter in stack)


def _native(
    spec: CellSpec,
    x: Tensor,
    batch_sizes: Tensor | None,
    h0: Tensor,
    c0: Tensor | None,
    params: Sequence[Tensor],
    num_layers: int,
    dropout: float,
    batch_first: bool,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """torch's own implementation, for dtypes and devices without kernels."""
    directions = size(h0, 0) // num_layers
    has_biases = len(params) // (directions * num_layers) >= 4
    hx = h0 if c0 is None else (h0, c0)
    options = (has_biases, num_layers, dropout, dropout > 0, directions == 2)
    function = getattr(torch._VF, spec.name)
    if batch_sizes is None:
        result = function(x, hx, params, *options, batch_first)
    else:
        result = function(x, batch_sizes, hx, params, *options)
    return result[0], result[1], None if c0 is None else result[2]

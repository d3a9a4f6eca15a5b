"""Checks that every backend relies on. The messages are torch's."""

from __future__ import annotations

from typing import NoReturn

from torch import Tensor

from fastrnn.layer_call import LayerCall
from fastrnn.tracing import size


def check_layers(call: LayerCall) -> None:
    """Runs `check_alike`, and raises for a padded input with T = 0."""
    check_alike(call)
    if call.batch_sizes is None and size(call.x, 0) == 0:
        raise RuntimeError("Expected sequence length to be larger than 0 in RNN")


def check_alike(call: LayerCall) -> None:
    """Raises unless all tensors have the dtype and the device of the input."""
    x, h0, c0 = call.x, call.h0, call.c0
    dtype, device = x.dtype, x.device
    is_cpu = x.is_cpu  # reading this flag is faster than comparing devices
    for w in call.weights.flat:
        if w.dtype != dtype or not (w.is_cpu if is_cpu else w.device == device):
            _raise_mismatch(x, w, "parameter")
    for state in (h0,) if c0 is None else (h0, c0):
        if state.dtype != dtype or not (state.is_cpu if is_cpu else state.device == device):
            _raise_mismatch(x, state, "hidden")


def _raise_mismatch(x: Tensor, other: Tensor, role: str) -> NoReturn:
    if x.device != other.device:
        raise RuntimeError(
            f"Input and {role} tensors are not at the same device, found input tensor at "
            f"{x.device} and {role} tensor at {other.device}"
        )
    raise RuntimeError(
        f"Input and {role} tensors are not the same dtype, found input tensor with {x.dtype} "
        f"and {role} tensor with {other.dtype}"
    )


def check_step(call: LayerCall) -> None:
    """Raises unless the sizes of a single step fit together."""
    x, w_ih = call.x, call.weights.flat[0]
    batch = x.shape[0]
    input_size, hidden_size = w_ih.shape[1], w_ih.shape[0] // call.spec.gates
    if x.shape[1] != input_size:
        raise RuntimeError(
            f"input has inconsistent input_size: got {x.shape[1]} expected {input_size}"
        )
    for index, state in enumerate((call.h0, call.c0)):
        if state is None:
            continue
        if state.dim() != 2:
            raise RuntimeError(f"hidden{index} should be 2D like a batched input, got 1D")
        if state.shape[0] != batch:
            raise RuntimeError(
                f"Input batch size {batch} doesn't match hidden{index} batch size {state.shape[0]}"
            )
        size = hidden_size if index == 0 else call.spec.cell_states * hidden_size
        if state.shape[1] != size:
            raise RuntimeError(
                f"hidden{index} has inconsistent hidden_size: got {state.shape[1]}, expected {size}"
            )

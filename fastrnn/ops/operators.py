"""The operators of ``torch.ops.fastrnn`` as Python calls them.

An operator returns a fixed number of tensors. Some are placeholders for results that were not
requested or do not exist; only `decode` and `decode_layer` know which.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastrnn import _C, _library
from fastrnn._torch_internals import has_kernel
from fastrnn.layer_call import LayerCall, Results

_library.load()


_RAGGED = "fastrnn::ragged_forward() "


def raise_interruption(error: BaseException) -> None:
    """Raises the signal handler's exception (Ctrl-C: KeyboardInterrupt) if it ended the call."""
    _C.raise_interruption(str(error))


def raise_unless_rejected(error: Exception) -> None:
    """Raises the error again unless an operator or the dispatcher rejected the arguments.

    The general path may support rejected arguments or explain them in torch's words. Any other
    failure (not enough memory, a bug) must not be retried, because that would hide it.
    """
    raise_interruption(error)
    message = str(error)
    is_rejection = message.startswith(("fastrnn: ", "fastrnn::recurrent_forward() ", _RAGGED))
    is_failure = message.startswith("fastrnn: the call failed: ")
    # the dispatcher raises NotImplementedError for a device without kernels
    if is_failure or not (is_rejection or isinstance(error, NotImplementedError)):
        raise error


def interruptible(operator: Any) -> Any:
    """Wraps an operator: if a signal handler ended the call, the handler's exception is raised."""

    @functools.wraps(operator)
    def call(*args: Any) -> Any:
        try:
            return operator(*args)
        except RuntimeError as error:
            raise_interruption(error)
            raise

    return call


#: the operators without a wrapper, for the fast path and for graphs
forward_op = torch.ops.fastrnn.recurrent_forward.default
layer_op = torch.ops.fastrnn.recurrent_layer.default
backward_op = torch.ops.fastrnn.recurrent_backward.default
states_op = torch.ops.fastrnn.recurrent_states.default
states_backward_op = torch.ops.fastrnn.recurrent_states_backward.default
ragged_layer_op = torch.ops.fastrnn.ragged_layer.default

interruptible_forward = interruptible(forward_op)
interruptible_states = interruptible(states_op)
chunked_forward_op = interruptible(torch.ops.fastrnn.recurrent_chunked_forward.default)
chunked_gradients_op = interruptible(torch.ops.fastrnn.recurrent_chunked_gradients.default)
_interruptible_stack = interruptible(torch.ops.fastrnn.recurrent_stack.default)
#: the operators that compute gradients, by number of directions
gradient_ops = {
    1: interruptible(torch.ops.fastrnn.recurrent_gradients.default),
    2: interruptible(torch.ops.fastrnn.recurrent_bidirectional_gradients.default),
}
#: the operators of padded batches with lengths and resets (`fastrnn.ops.ragged`)
ragged_forward = interruptible(torch.ops.fastrnn.ragged_forward.default)
ragged_gradients = interruptible(torch.ops.fastrnn.ragged_gradients.default)
#: those of padded batches whose states are replaced, on CUDA (`fastrnn.ops.ragged_on_device`)
reset_forward = torch.ops.fastrnn.recurrent_reset_forward.default
reset_backward = torch.ops.fastrnn.recurrent_reset_backward.default

OPERATORS = (
    "layer",
    "recurrent_layer",
    "recurrent_forward",
    "recurrent_backward",
    "recurrent_gradients",
    "recurrent_bidirectional_gradients",
    "recurrent_stack",
    "recurrent_states",
    "recurrent_states_backward",
    "recurrent_chunked_forward",
    "recurrent_chunked_gradients",
    "ragged_forward",
    "ragged_layer",
    "ragged_gradients",
    "recurrent_reset_forward",
    "recurrent_reset_backward",
    "recurrence",
    "recurrence_gradients",
    "recurrence_product",
    "recurrence_product_gradients",
    "linear_scan",
    "linear_scan_gradients",
)

#: dtypes that the kernels compute with
DTYPES = frozenset({torch.float16, torch.bfloat16, torch.float32, torch.float64})
#: devices with kernels; "meta" stands for tensors that have shapes only
DEVICES = frozenset(
    {"meta"}
    | {key.lower() for key in ("CPU", "CUDA") if has_kernel("fastrnn::recurrent_forward", key)}
)

HALF = frozenset({torch.float16, torch.bfloat16})


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    """Returns the dtype that the kernels accumulate in."""
    return torch.float32 if dtype in HALF else dtype


def decode(results: Sequence[Tensor], indices: Sequence[int | None]) -> list[Tensor | None]:
    """Returns the results at these indices; None for an index of None."""
    return [None if index is None else results[index] for index in indices]


def decode_layer(call: LayerCall, y: Tensor, h_n: Tensor, c_n: Tensor) -> Results:
    """Returns the results of a layer; c_n is None if the cell has no cell state."""
    return y, h_n, None if call.c0 is None else c_n


def records_gradient(call: LayerCall) -> bool:
    """Whether autograd will record the call."""
    c0 = call.c0
    return torch.is_grad_enabled() and (
        call.x.requires_grad
        or call.h0.requires_grad
        or (c0 is not None and c0.requires_grad)
        or True in [w.requires_grad for w in call.weights.flat]
    )


def infer_layer(call: LayerCall) -> Results:
    """Runs one layer by the kernels, without a gradient."""
    spec, x, (sequence, bits), h0, c0, (weights, slots), options = call
    slots |= bits
    # while a graph is captured, only calls with a weight_format reach this line
    run = forward_op if torch.compiler.is_compiling() else interruptible_forward
    outputs = spec.inference_outputs
    if options.weight_format and x.device.type == "cpu":
        y, h_n, c_n, _ = run(
            x, h0, c0, weights, slots, sequence, spec.name, outputs, options.weight_format
        )
    else:
        y, h_n, c_n, _ = run(x, h0, c0, weights, slots, sequence, spec.name, outputs)
    return decode_layer(call, y, h_n, c_n)


def captured_layer(call: LayerCall) -> Results:
    """Runs one layer as an operator of a graph; at run time it saves values if needed."""
    spec, x, (sequence, bits), h0, c0, (weights, slots), _ = call
    y, h_n, c_n = layer_op(x, h0, c0, weights, slots | bits, sequence, spec.name)
    return decode_layer(call, y, h_n, c_n)


def infer_stack(call: LayerCall) -> Results:
    """Runs stacked layers of one direction in one call, two at the same time if that is faster."""
    spec, x, (sequence, bits), h0, c0, (weights, slots), _ = call
    c0s = [] if c0 is None else list(c0.split(1))
    y, h_n, c_n = _interruptible_stack(
        x, list(h0.split(1)), c0s, weights, slots | bits, sequence, spec.name
    )
    return y, torch.cat(h_n), None if c0 is None else torch.cat(c_n)

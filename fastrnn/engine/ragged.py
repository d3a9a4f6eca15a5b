"""Lengths and resets of padded batches: their checks, and the way to compute them.

Stacked layers run by an operator per layer (`fastrnn.ops.ragged`) in graphs and on CUDA. In eager
code on the CPU single layers do, and stacked layers with resets only. Otherwise, on CUDA each
direction runs with masks (`fastrnn.ops.masked`). On the CPU the layers are composed
(`fastrnn.ops.segments`) of the backends' packed batches.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastrnn import autocast
from fastrnn._torch_internals import are_transforms_active
from fastrnn.backends.conditions import unsupported_tensors, unsupported_transform
from fastrnn.engine import choose
from fastrnn.engine.checks import check_layers
from fastrnn.engine.heads import run_heads
from fastrnn.engine.lengths_on_device import can_run, run_lengths_on_device
from fastrnn.engine.ragged_states import recorded_layer, run_masked
from fastrnn.engine.run import run, without_autocast
from fastrnn.layer_call import DEFAULTS, LayerCall, Options, Results
from fastrnn.ops import ragged_layer, recomputes
from fastrnn.ops.masked import masked_layer
from fastrnn.ops.ragged import cast_states
from fastrnn.ops.ragged_on_device import keeps_marks
from fastrnn.ops.segments import Ragged, run_composed, slice_states
from fastrnn.ops.stacking import layer_input, layer_output
from fastrnn.spec import CellSpec, Weights
from fastrnn.tracing import is_capturing, is_in_onnx_export, size, without_tracing


class Marks(NamedTuple):
    """The marks on the rows of a padded batch that a caller gives, unchecked.

    Attributes:
        lengths: integers [B].
        resets: bool, or 0 and 1, [T,B] or [B,T], with or without a trailing 1.
        reset_state: as the initial states: a tensor, or a pair for an LSTM.
    """

    lengths: Any = None
    resets: Any = None
    reset_state: Any = None

    def check_absent(self, input: str) -> None:
        """Raises if there is a mark, where ``input`` is an input that can have none."""
        for name, value in self._asdict().items():
            if value is not None:
                raise ValueError(f"{name} must not be given with {input}, got one")


NO_MARKS = Marks()


def as_ragged(marks: Marks, spec: CellSpec, batch_first: bool) -> Ragged | None:
    """Returns unchecked marks as the operators take them, or None if they need a conversion."""
    lengths, resets, state = marks
    if not (lengths is None or (type(lengths) is Tensor and lengths.is_cpu)):
        return None
    if resets is not None:
        if type(resets) is not Tensor or resets.dim() != 2 or resets.dtype != torch.bool:
            return None
        if batch_first:
            resets = resets.t()
    if state is None:
        return Ragged(lengths, resets)
    reset_h, reset_c = state, None
    if spec.has_cell_state:
        if not isinstance(state, tuple | list) or len(state) != 2:
            return None
        reset_h, reset_c = state
    if resets is None or not isinstance(reset_h, Tensor):
        return None
    if spec.has_cell_state and not isinstance(reset_c, Tensor):
        return None
    return Ragged(lengths, resets, reset_h, reset_c)


def run_marked(call: LayerCall, marks: Marks, batch_first: bool) -> Results:
    """Checks the marks and runs stacked layers.

    Args:
        call: the layers; x [T,B,I], or [B,T,I] with ``batch_first``.
        marks: lengths and resets.
        batch_first: whether x, y and ``resets`` have the batch first.

    Returns:
        y, zero beyond a row's length; h_n [L*D,B,R] and c_n [L*D,B,C*H], the states after the last
        step of each row.

    Raises:
        TypeError, ValueError: a mark does not fit.
        RuntimeError: the graph that is captured cannot have marks.
    """
    if batch_first:
        call = call._replace(x=call.x.transpose(0, 1))
    without_tracing(_check_kinds, call, marks, batch_first)
    if call.options.heads > 1:
        if batch_first and marks.resets is not None:
            marks = marks._replace(resets=marks.resets.transpose(0, 1))
        y, h_n, c_n = run_heads(
            call,
            marks.reset_state,
            lambda own, state: run_marked(own, marks._replace(reset_state=state), False),
        )
        return y.transpose(0, 1) if batch_first else y, h_n, c_n
    is_graph = torch.compiler.is_compiling() or is_capturing()
    if not is_graph and _stays_on_device(call, marks):
        results = run_lengths_on_device(call, marks.lengths.detach().to(call.x.device, torch.int64))
        return results[0].transpose(0, 1) if batch_first else results[0], *results[1:]
    reason = _unsupported(call)
    on_device = _runs_on_device(call)
    ragged = _convert(call, marks, batch_first, not on_device)
    if is_graph and not reason:
        y, h_n, c_n = _run_by_operators(call, ragged)
    elif is_capturing() or (is_graph and not call.has_plain_cell):
        raise RuntimeError(f"lengths and resets cannot be in this graph: {reason}.")
    else:
        ragged = check_values(ragged, size(call.x, 0))
        is_plain = _has_operators(call, ragged) and choose.may_use_fast_path()
        if on_device:
            y, h_n, c_n = _run_by_operators(call, ragged)
        elif not reason and call.x.is_cpu and is_plain:
            check_layers(call)
            y, h_n, c_n = _run_layers(call, ragged)
        else:
            y, h_n, c_n = run_composed(call, ragged, run)
    return y.transpose(0, 1) if batch_first else y, h_n, c_n


def _has_operators(call: LayerCall, ragged: Ragged) -> bool:
    """Whether an eager call on the CPU runs by an operator per layer.

    With lengths, stacked layers are composed: all of them share one packed batch.
    """
    options = call.options
    if options.num_layers == 1:
        return options == DEFAULTS
    plain = options._replace(num_layers=1, dropout=0.0, residual=False) == DEFAULTS
    return plain and ragged.lengths is None


def _stays_on_device(call: LayerCall, marks: Marks) -> bool:
    """Whether a call on CUDA with lengths runs by the kernels of a padded batch."""
    lengths: Any = marks.lengths
    if not (keeps_marks(call.x) and marks.resets is None and keeps_marks(lengths)):
        return False
    return call.has_plain_cell and can_run(call)


def _runs_on_device(call: LayerCall) -> bool:
    """Whether a call on CUDA runs without the values of the marks."""
    if is_in_onnx_export() or choose.is_watched():
        return False
    return keeps_marks(call.x) and call.has_plain_cell


def _unsupported(call: LayerCall) -> str:
    """Returns the reason why there is no operator for a call with marks, or ""."""
    if is_in_onnx_export():
        return "ONNX does not have this operator"
    reason = unsupported_transform() or unsupported_tensors(call)
    return reason.format(
        cell=call.spec.name,
        dtype=str(call.x.dtype).removeprefix("torch."),
        device=call.x.device,
    )


def _run_by_operators(call: LayerCall, ragged: Ragged) -> Results:
    """Runs stacked layers by an operator per layer."""
    if not autocast.acts_on(call.x):
        check_layers(call)
        return _run_layers(call, ragged)
    cast = autocast.cast_call(call)
    with without_autocast(cast):
        check_layers(cast)
        results = _run_layers(cast, cast_states(ragged, cast.x.dtype))
    return autocast.cast_results(call, results)


def _run_layers(call: LayerCall, ragged: Ragged) -> Results:
    """Runs the layers in order; `fastrnn.ops.stacking` defines what each one reads."""
    (flat, slots), num_layers = call.weights, call.options.num_layers
    count = len(flat) // num_layers
    directions = size(call.h0, 0) // num_layers
    x = call.x
    h_n, c_n = [], []
    for index in range(num_layers):
        states = slice(index * directions, (index + 1) * directions)
        own = call._replace(
            x=layer_input(x, index, call.options),
            h0=call.h0[states],
            c0=None if call.c0 is None else call.c0[states],
            weights=Weights(flat[index * count : (index + 1) * count], slots),
            options=DEFAULTS,
        )
        marks = slice_states(ragged, states)
        y, h, c = _run_layer(own, marks, call.options)
        x = layer_output(y, x, index, call.options)
        h_n.append(h)
        if c is not None:
            c_n.append(c)
    return x, torch.cat(h_n), torch.cat(c_n) if c_n else None


def _run_layer(call: LayerCall, ragged: Ragged, options: Options) -> Results:
    """Runs one layer; the options are those of the stack."""
    recorder = options.recorder
    if torch.compiler.is_compiling() or is_capturing():
        is_operator = not _unsupported(call)
    else:
        call = call._replace(options=DEFAULTS._replace(recompute=options.recompute))
        is_recorded = recorder is not None or recomputes(call)
        is_operator = not (is_recorded or are_transforms_active() or _unsupported(call))
    if is_operator:
        if recorder is None:
            return ragged_layer(call, ragged)
        return recorded_layer(call, ragged, recorder)
    by_kernels = not (are_transforms_active() or _unsupported(call))
    if recorder is None:
        return masked_layer(call, ragged, by_kernels).results
    return run_masked(call, ragged, recorder, by_kernels)


def _states(marks: Marks, call: LayerCall) -> list[tuple[str, Any, Tensor]]:
    """Returns, for each state after a reset that is given, its name, itself and the initial one."""
    state = marks.reset_state
    if state is None:
        return []
    if call.c0 is None:
        return [("reset_state", state, call.h0)]
    return [
        ("reset_state[0]", state[0], call.h0),
        ("reset_state[1]", state[1], call.c0),
    ]


def _check_kinds(call: LayerCall, marks: Marks, batch_first: bool) -> None:
    """Checks everything except the values of the marks."""
    steps, batch, _ = call.x.shape
    if marks.lengths is not None:
        check_lengths(marks.lengths, batch)
    if marks.resets is not None:
        check_resets(marks.resets, steps, batch, batch_first)
    state = marks.reset_state
    if state is None:
        return
    if marks.resets is None:
        raise ValueError("reset_state must be given together with resets, got it alone")
    if call.c0 is not None and (not isinstance(state, tuple | list) or len(state) != 2):
        kind = type(state).__name__
        raise TypeError(f"reset_state must be a pair of tensors, h and c, got {kind}")
    for name, own, like in _states(marks, call):
        check_reset_state(own, like, steps, name)


def _convert(call: LayerCall, marks: Marks, batch_first: bool, to_cpu: bool) -> Ragged:
    """Returns checked marks as the operators take them; resets may still be float64."""
    lengths, resets = marks.lengths, marks.resets
    if lengths is not None:
        lengths = lengths.detach().to(torch.int64)
        lengths = lengths.cpu() if to_cpu else lengths
    if resets is not None:
        resets = resets.detach()
        resets = resets.cpu() if to_cpu else resets
        if resets.dim() == 3:
            resets = resets.squeeze(-1)
        if resets.dtype != torch.bool:
            resets = resets.to(torch.float64)
        if batch_first:
            resets = resets.t()
    expanded = [None, None]
    for index, (_, own, like) in enumerate(_states(marks, call)):
        # a batch of 1 serves all rows
        expanded[index] = own.expand(*own.shape[:-2], like.shape[-2], like.shape[-1])
    return Ragged(lengths, resets, *expanded)


def check_values(ragged: Ragged, steps: int) -> Ragged:
    """Checks the values of the marks that are on the CPU. Returns them with resets as bool.

    Raises:
        ValueError: a length is negative or larger than T, or a reset is neither 0 nor 1.
    """
    lengths, resets = ragged.lengths, ragged.resets
    if lengths is not None and lengths.is_cpu and len(lengths):
        wrong = lengths[(lengths < 0) | (lengths > steps)]
        if len(wrong):
            raise ValueError(
                f"lengths must be from 0 to the {steps} steps of input, got {int(wrong[0])}"
            )
    if resets is not None and resets.is_cpu and resets.dtype != torch.bool:
        is_one = resets == 1
        if not bool((is_one | (resets == 0)).all()):
            raise ValueError("resets must hold only 0 and 1, got another value")
        resets = is_one
    return ragged._replace(resets=resets)


def _shape(t: Tensor) -> str:
    return str(list(t.shape))


def check_lengths(lengths: Any, batch: int) -> None:
    """Checks the kind of ``lengths``.

    Raises:
        TypeError: it is no tensor of integers.
        ValueError: its shape does not fit.
    """
    if not isinstance(lengths, Tensor) or lengths.is_floating_point() or lengths.is_complex():
        kind = lengths.dtype if isinstance(lengths, Tensor) else type(lengths).__name__
        raise TypeError(f"lengths must be a tensor of integers, got {kind}")
    if lengths.dtype == torch.bool:
        raise TypeError("lengths must be a tensor of integers, got torch.bool")
    if lengths.shape != (batch,):
        raise ValueError(f"lengths must have the shape [{batch}], got {_shape(lengths)}")


def check_resets(resets: Any, steps: int, batch: int, batch_first: bool) -> None:
    """Checks the kind of ``resets``.

    Raises:
        TypeError: it is no tensor of real numbers.
        ValueError: its shape does not fit.
    """
    if not isinstance(resets, Tensor) or resets.is_complex():
        kind = resets.dtype if isinstance(resets, Tensor) else type(resets).__name__
        raise TypeError(f"resets must be a tensor of bool or of 0 and 1, got {kind}")
    sizes = [batch, steps] if batch_first else [steps, batch]
    if list(resets.shape) not in (sizes, [*sizes, 1]):
        raise ValueError(f"resets must have the shape {sizes}, got {_shape(resets)}")


def check_reset_state(state: Any, like: Tensor, steps: int, name: str) -> None:
    """Checks the kind of a state after a reset.

    Args:
        state: the state, whose batch may be 1.
        like: the initial state [L*D,B,*].
        steps: T.
        name: what to call it in a message.

    Raises:
        TypeError: it is no tensor.
        ValueError: its shape does not fit.
    """
    if not isinstance(state, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(state).__name__}")
    count, batch, size = like.shape
    sizes: Sequence[int] = (count, batch, size) if state.dim() == 3 else (steps, count, batch, size)
    one = [*sizes[:-2], 1, size]
    if list(state.shape) not in (list(sizes), one):
        raise ValueError(
            f"{name} must have the shape {[count, batch, size]}, or one with a batch of 1 or with "
            f"{steps} steps before, got {_shape(state)}"
        )

"""Lengths on a device whose values the host does not read.

The kernels run all T steps of all rows. The results beyond a row's end are then replaced:

    lengths 4, 2     x  x00 x01 x02 x03     y  y00 y01 y02 y03     h_n  y03
                        x10 x11  0   0         y10 y11  0   0           y11

Direction 1 gets each row in reverse order within its length, and runs as direction 0. Everything is
queued on the stream, so a call can be part of a CUDA graph. The time is that of the padded batch.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastrnn.engine.run import run
from fastrnn.engine.states import Recorder
from fastrnn.layer_call import LayerCall, Results
from fastrnn.ops.segments import take
from fastrnn.ops.stacking import layer_input, layer_output
from fastrnn.spec import Weights

#: cells whose states stay finite whatever the steps beyond a row's end compute from x = 0; an h
#: that overflows there would make the gradient of w_hh NaN
_BOUNDED = frozenset({"rnn_tanh", "rnn_sigmoid", "gru", "lstm"})


def can_run(call: LayerCall) -> bool:
    """Whether a call with lengths can run without their values."""
    options = call.options
    # the path below gets c_n from a recorder, which keeps the values of all steps
    is_recorded = options.recorder is not None or (call.c0 is not None and options.recompute != 0)
    return call.spec.name in _BOUNDED and not is_recorded


def run_lengths_on_device(call: LayerCall, lengths: Tensor) -> Results:
    """Runs stacked layers over a padded batch with lengths, without reading their values.

    Args:
        call: the layers; x [T,B,I], of a cell that `can_run`.
        lengths: int64 [B] on the device of x. Values beyond 0 ... T count as 0 or T.

    Returns:
        y [T,B,D*R], zero beyond a row's length; h_n and c_n, the states after each row's last step.
    """
    spec, x, sequence, h0, c0, (flat, slots), own = call
    steps = x.shape[0]
    if steps == 0:
        return run(call)
    lengths = lengths.clamp(0, steps)
    t = torch.arange(steps, device=lengths.device).unsqueeze(1)
    exists = t < lengths  # [T,B]
    batch = torch.arange(len(lengths), device=lengths.device)
    mirrored = (torch.where(exists, lengths - 1 - t, t) * len(lengths) + batch).flatten()
    is_last = (t == lengths - 1).unsqueeze(-1)
    is_empty = (lengths == 0).unsqueeze(-1)
    exists = exists.unsqueeze(-1)

    def mirror(rows: Tensor) -> Tensor:
        """Reverses each row of [T,B,*] within its length."""
        return take(rows.flatten(0, 1), 0, mirrored).view_as(rows)

    def final(states: Tensor, initial: Tensor) -> Tensor:
        """Returns the state after each row's last step, [B,*] from states [T,B,*]."""
        last = torch.where(is_last, states, 0).sum(0, dtype=states.dtype)
        return torch.where(is_empty, initial, last.to(initial.dtype))

    directions = h0.shape[0] // own.num_layers
    count = len(flat) // h0.shape[0]
    h_n, c_n = [], []
    x = torch.where(exists, x, 0)  # padding may hold anything, such as NaN
    for layer in range(own.num_layers):
        below = x
        x = layer_input(below, layer, own)
        outputs = []
        for direction in range(directions):
            index = layer * directions + direction
            states = slice(index, index + 1)
            recorder = None if c0 is None else Recorder(True, False)
            options = own._replace(num_layers=1, dropout=0.0, recorder=recorder)
            y, _, _ = run(
                LayerCall(
                    spec,
                    mirror(x) if direction else x,
                    sequence,
                    h0[states],
                    None if c0 is None else c0[states],
                    Weights(flat[index * count : (index + 1) * count], slots),
                    options,
                )
            )
            h_n.append(final(y, h0[index]))
            if recorder is not None and c0 is not None:
                _, c = recorder.extras(False, y, c0).states
                c_n.append(final(c.squeeze(1), c0[index]))
            y = torch.where(exists, y, 0)
            outputs.append(mirror(y) if direction else y)
        y = torch.cat(outputs, -1) if directions > 1 else outputs[0]
        x = layer_output(y, below, layer, own)
    return x, torch.stack(h_n), torch.stack(c_n) if c_n else None

"""Layers with heads: each head is an independent layer of H/heads units.

Head k has the k-th H/heads units of each gate: their rows of w_ih [G*H,I], of the biases and of
w_hh [G*H,H/heads]. So every backend, sequence and option of a layer serves a head.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastrnn.layer_call import DEFAULTS, LayerCall, Results
from fastrnn.ops.stacking import layer_input, layer_output
from fastrnn.spec import Weights
from fastrnn.tracing import size

#: runs one layer of one head. reset_state: the states after a reset of this layer and head
RunHead = Callable[[LayerCall, Any], Results]


def _of_head(t: Tensor, dim: int, parts: int, heads: int, head: int) -> Tensor:
    """Returns the units of a head from a dimension [parts*H]."""
    dim %= t.dim()
    divided = t.unflatten(dim, (parts, heads, size(t, dim) // (parts * heads)))
    own: Tensor = divided.select(dim + 1, head)
    return own.flatten(dim, dim + 1)


def _join(parts: list[Tensor], count: int) -> Tensor:
    """Returns [*,count*H] from the heads [*,count*H/heads]."""
    units = size(parts[0], -1) // count
    divided = [t.unflatten(-1, (count, units)) for t in parts]
    return torch.stack(divided, -2).flatten(-3)


def run_heads(call: LayerCall, reset_state: Any, run_head: RunHead) -> Results:
    """Runs stacked layers, head by head; `fastrnn.ops.stacking` defines what each layer reads.

    Args:
        call: the layers.
        reset_state: None; or [*,L*D,B,H], the state after a reset; a pair for an LSTM.
        run_head: runs one layer of one head.
    """
    spec, (flat, slots), options = call.spec, call.weights, call.options
    heads, num_layers = options.heads, options.num_layers
    own_options = options._replace(num_layers=1, dropout=0.0, residual=False, heads=1)
    if own_options == DEFAULTS:
        own_options = DEFAULTS
    count, units = len(flat) // num_layers, size(call.h0, -1)
    directions = size(call.h0, 0) // num_layers
    x = call.x
    h_n, c_n = [], []
    for layer in range(num_layers):
        below = x
        x = layer_input(below, layer, options)
        first = layer * directions
        layer_weights = flat[layer * count : (layer + 1) * count]

        def states(t: Tensor, parts: int, head: int, first: int = first) -> Tensor:
            own = t.narrow(-3, first, directions)
            return _of_head(own, -1, parts, heads, head)

        results = []
        for head in range(heads):
            # a weight has a row per unit of each gate, or of each parameter per unit
            weights = [_of_head(w, 0, size(w, 0) // units, heads, head) for w in layer_weights]
            own = call._replace(
                x=x,
                h0=states(call.h0, 1, head),
                c0=None if call.c0 is None else states(call.c0, spec.cell_states, head),
                weights=Weights(weights, slots),
                options=own_options,
            )
            reset: Any = None
            if isinstance(reset_state, Tensor):
                reset = states(reset_state, 1, head)
            elif reset_state is not None:
                h, c = reset_state
                reset = states(h, 1, head), states(c, spec.cell_states, head)
            results.append(run_head(own, reset))
        y = _join([y for y, _, _ in results], directions)
        x = layer_output(y, below, layer, options)
        h_n.append(_join([h for _, h, _ in results], 1))
        if call.c0 is not None:
            c_n.append(_join([c for _, _, c in results if c is not None], spec.cell_states))
    return x, torch.cat(h_n), torch.cat(c_n) if c_n else None

"""Weights for the function ``flashrnn`` (github.com/NX-AI/flashrnn).

The hidden units are N heads of D units; a head sees only its own previous state. ``flashrnn`` gets
the input product Wx from the caller, who computes it with a linear layer.

===== =========== ============= ===============
      gates of R  gates of Wx   gates of b
===== =========== ============= ===============
elman h           h             h
lstm  i, f, g, o  i, f, g, o    i, f, g, o
gru   n, r, z     r, z, n       n of h, r, z, n of x
===== =========== ============= ===============
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastrnn.checks import describe
from fastrnn.interchange.weights import as_tensor, build, check_shape
from fastrnn.modules.base import RecurrentBase
from fastrnn.spec import CELLS, DirectionWeights

_OWNER = "from_flashrnn"

_CELLS = {"lstm": "lstm", "gru": "gru", "elman": "rnn_tanh"}


def from_flashrnn(
    input_weight: Any,
    recurrent_weight: Any,
    bias: Any,
    *,
    function: str = "lstm",
    input_bias: Any = None,
    device: Any = None,
    dtype: torch.dtype | None = None,
) -> RecurrentBase:
    """Returns a fastrnn module that computes what a linear layer and ``flashrnn`` compute.

        Wx = linear(x).unflatten(-1, (G, N, D))                   # [B,T,G,N,D]
        states, _ = flashrnn(Wx, R, b, function="lstm")           # [S,B,T,N,D]

        module = fastrnn.from_flashrnn(linear.weight, R, b, input_bias=linear.bias)
        output, _ = module(x)                                     # states[0], [B,T,N*D]

    The module has ``batch_first=True`` and H = N*D. Its recurrent matrix is dense and has zeros
    between different heads. The product costs N times as much as that of the heads alone, and
    training changes the zeros.

    Args:
        input_weight: [G*N*D,I], of the linear layer.
        recurrent_weight: R, [G,N,D,D]: gate, head, unit, unit of the previous state.
        bias: b, [G,N,D]; [4,N,D] for a GRU.
        function: "lstm", "gru" or "elman".
        input_bias: [G*N*D], of the linear layer, or None.
        device, dtype: of the parameters; those of ``input_weight`` by default.

    Raises:
        TypeError: an argument is not an array.
        ValueError: an array has another shape, or fastrnn has no layer for ``function``.
    """
    cell = _CELLS.get(str(function))
    if cell is None:
        raise ValueError(
            f"{_OWNER}: function must be one of {', '.join(map(repr, _CELLS))}, "
            f"got {describe(function)}."
        )
    gates = CELLS[cell].gates
    w = as_tensor(_OWNER, "input_weight", input_weight)
    r = as_tensor(_OWNER, "recurrent_weight", recurrent_weight)
    b = as_tensor(_OWNER, "bias", bias)
    if r.dim() != 4 or r.shape[0] != gates or r.shape[2] != r.shape[3] or r.numel() == 0:
        raise ValueError(
            f"{_OWNER}: recurrent_weight must be of shape [{gates}, N, D, D], got {list(r.shape)}."
        )
    heads, size = r.shape[1:3]
    rows = gates * heads * size
    inputs = w.shape[1] if w.dim() == 2 else 0
    check_shape(_OWNER, "input_weight", w, (rows, inputs), f"[{gates}*N*D, I]")
    biases = gates + 1 if cell == "gru" else gates
    check_shape(_OWNER, "bias", b, (biases, heads, size), f"[{biases}, N, D]")
    b = b.flatten(1)
    if cell == "gru":
        n_of_h, n_of_x = b[:1], b[3:]
        r = r.roll(-1, 0)  # n, r, z -> r, z, n
        b_ih = torch.cat((b[1:3], n_of_x)).flatten()
        b_hh = torch.cat((torch.zeros_like(b[1:3]), n_of_h)).flatten()
    else:
        b_ih, b_hh = b.flatten(), torch.zeros_like(b).flatten()
    if input_bias is not None:
        added = as_tensor(_OWNER, "input_bias", input_bias)
        check_shape(_OWNER, "input_bias", added, (rows,), f"[{gates}*N*D]")
        b_ih = b_ih + added
    own = DirectionWeights(w, _dense(r), b_ih, b_hh)
    return build(_OWNER, cell, [[own]], batch_first=True, device=device, dtype=dtype)


def _dense(r: Tensor) -> Tensor:
    """Returns the block-diagonal matrices [G*N*D,N*D] of R [G,N,D,D]."""
    return torch.cat([torch.block_diag(*gate) for gate in r])

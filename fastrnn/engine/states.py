"""States and gates of every step of stacked layers.

A `Recorder` in the options of a call replaces the choice of a backend (`fastrnn.engine.choose`). It
runs each layer with the best backend that returns what its steps leave, and collects it:

    h      views of the layer's output
    c      the cell states, which the kernels save for backward
    gates  the activations, which the kernels save for backward
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastrnn.backends import Backend, captured, composite, kernels
from fastrnn.engine import choose
from fastrnn.layer_call import DEFAULTS, LayerCall, Results
from fastrnn.ops.states import Steps, composite_steps, gate_names, kernel_steps, output_rows
from fastrnn.tracing import is_tracing, without_tracing

#: the backends that can return what every step leaves
BACKENDS: tuple[Backend, ...] = (kernels, captured, composite)


class Extras(NamedTuple):
    """The third result of a layer that is called with ``return_all_states`` or ``return_gates``.

    Attributes:
        states: h after each step [T,L*D,B,R]; for an LSTM the pair of h and c [T,L*D,B,H]. None if
            ``return_all_states`` is false.
        gates: for each gate by its name its activations at each step [T,L*D,B,H], without a
            gradient: i, f, g, o of an LSTM, r, z, n of a GRU, h of an RNN. None if
            ``return_gates`` is false.

    All are [B,T,L*D,*] with ``batch_first``, [T,L*D,*] for an input without a batch dimension, and
    [N,L*D,*] for the N rows of a `PackedSequence`.
    """

    states: Any
    gates: dict[str, Tensor] | None


class Recorder:
    """Runs layers like a backend and collects what their steps leave.

    Attributes:
        returns_states, returns_gates: what to collect.
        sizes: (T,B) of a padded batch, (N,) of packed rows.
    """

    NAME = "states"
    WHOLE_STACK = False

    def __init__(self, returns_states: bool, returns_gates: bool) -> None:
        self.returns_states, self.returns_gates = returns_states, returns_gates
        self.sizes: tuple[int, ...] = ()
        # each [N,D,*]: of one layer, or of one layer and direction
        self._h: list[Tensor] = []
        self._c: list[Tensor] = []
        self._gates: list[dict[str, Tensor]] = []

    def unsupported(self, call: LayerCall) -> str:
        return ""

    def run(self, call: LayerCall) -> Results:
        """Runs one layer and collects what its steps leave."""
        steps = self._steps(call._replace(options=DEFAULTS))
        self.collect(call, steps.results[0], steps.c, steps.gates)
        return steps.results

    def collect(
        self, call: LayerCall, y: Tensor, c: Tensor | None, gates: dict[str, Tensor] | None
    ) -> None:
        """Adds what the steps of one layer leave.

        Args:
            call: the layer.
            y: its output.
            c: [N,D,C*H], None if the cell has none.
            gates: for each gate [N,D,H], None if they are not wanted.
        """
        self.sizes = tuple(call.x.shape[:-1])
        if self.returns_states:
            self._h.append(output_rows(call, y))
            if c is not None:
                self._c.append(c)
        if gates is not None:
            self._gates.append(gates)

    def rows(self) -> tuple[Tensor | None, dict[str, Tensor]]:
        """Returns c [N,L*D,C*H], or None, and the gates [N,L*D,H] that have been collected."""
        gates = {
            name: torch.cat([own[name] for own in self._gates], 1)
            for name in (self._gates[0] if self._gates else ())
        }
        return torch.cat(self._c, 1) if self._c else None, gates

    def _steps(self, call: LayerCall) -> Steps:
        backend = choose.choose(call, BACKENDS)
        if backend in (kernels, captured):
            return kernel_steps(call, self.returns_states, self.returns_gates)
        steps = composite_steps(call, self.returns_states, self.returns_gates)
        return steps if backend is composite else steps._replace(results=backend.run(call))

    def move(self, place: Callable[[Tensor], Tensor], since: int, sizes: tuple[int, ...]) -> None:
        """Changes the rows of what has been collected since a `count`.

        Args:
            place: from [N,D,*] to the same with other rows.
            since: the count.
            sizes: the new sizes.
        """
        for collected in (self._h, self._c):
            collected[since:] = [place(t) for t in collected[since:]]
        self._gates[since:] = [
            {name: place(t) for name, t in gates.items()} for gates in self._gates[since:]
        ]
        self.sizes = sizes

    def skip(self, call: LayerCall) -> None:
        """Collects zeros for stacked layers that run no step of a padded batch."""
        self.sizes = tuple(call.x.shape[:-1])
        layers, spec = call.options.num_layers, call.spec
        states, _, size = call.h0.shape
        hidden = call.weights.flat[0].shape[0] // spec.gates
        rows = call.x.shape[0] * call.x.shape[1]

        def zeros(width: int) -> Tensor:
            return call.x.new_zeros(rows, states // layers, width)

        for _ in range(layers):
            if self.returns_states:
                self._h.append(zeros(size))
                if call.c0 is not None:
                    self._c.append(zeros(call.c0.shape[2]))
            if self.returns_gates:
                self._gates.append({name: zeros(hidden) for name in gate_names(spec)})

    @property
    def count(self) -> int:
        """Number of layers, or of layers and directions, that have been collected."""
        return max(len(self._h), len(self._gates))

    def extras(self, batch_first: bool, output: Tensor, c_n: Tensor | None) -> Extras:
        """Returns what has been collected, in the types of the output and of c_n."""

        def shaped(parts: list[Tensor], like: Tensor) -> Tensor:
            rows = torch.cat(parts, 1).to(like.dtype)
            if len(self.sizes) == 1:
                return rows
            t: Tensor = rows.unflatten(0, self.sizes)  # [T,B,L*D,*]
            return t.transpose(0, 1) if batch_first else t.transpose(1, 2)

        states: Any = None
        gates = None
        if self.returns_states:
            states = shaped(self._h, output)
            if c_n is not None:
                states = states, shaped(self._c, c_n)
        if self.returns_gates:
            gates = {
                name: shaped([own[name] for own in self._gates], output) for name in self._gates[0]
            }
        return Extras(states, gates)


def untraced(option: Any) -> Any:
    """Returns an option as a bool where torch's older ONNX exporter has made it a tensor."""
    if is_tracing() and isinstance(option, Tensor) and option.dtype == torch.bool:
        return without_tracing(option.item)
    return option


def recorder_of(return_all_states: Any, return_gates: Any) -> Recorder | None:
    """Returns a recorder for these options of a call; None if both are false.

    Raises:
        TypeError: an option is no bool.
    """
    for name, value in (("return_all_states", return_all_states), ("return_gates", return_gates)):
        if not isinstance(value, bool):
            raise TypeError(f"{name} must be a bool, got {type(value).__name__}")
    if not (return_all_states or return_gates):
        return None
    return Recorder(return_all_states, return_gates)


def map_extras(extras: Extras, function: Callable[[Tensor], Tensor]) -> Extras:
    """Returns the extras with a function applied to each tensor."""
    states, gates = extras
    if isinstance(states, tuple):
        states = tuple([function(t) for t in states])
    elif states is not None:
        states = function(states)
    return Extras(states, gates and {name: function(t) for name, t in gates.items()})

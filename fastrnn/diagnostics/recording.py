"""A backend that computes layers step by step and records states and gates.

Every call of a recurrent module selects a backend (`fastrnn.engine.choose`). While a model is
diagnosed, this one computes the calls of the model's modules by the steps of `fastrnn.reference`.
The states between steps are then tensors of the graph, and the loss has gradients with respect to
them.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from fastrnn import autocast
from fastrnn.backends import Backend, composite
from fastrnn.diagnostics import measures
from fastrnn.layer_call import LayerCall, Results
from fastrnn.ops import HALF
from fastrnn.reference import STEPS
from fastrnn.spec import CellSpec, DirectionWeights, Weights


@dataclass
class Record:
    """The records of one layer and direction, over all its calls.

    Attributes:
        spec: the cell.
        hidden: the state h after each step, in the order of time; [B,R], or the active rows.
        cell: the same for the cell state, [B,C*H]; empty without one.
        weights: the weights of the last call.
        rows: rows of all steps: the number of activations per unit.
        saturated: for each gate, [2] activations below the lower and above the upper bound.
        low, high: [R] smallest and largest value of each output.
    """

    spec: CellSpec
    hidden: list[Tensor] = field(default_factory=list)
    cell: list[Tensor] = field(default_factory=list)
    weights: DirectionWeights | None = None
    rows: int = 0
    saturated: dict[str, Tensor] = field(default_factory=dict)
    low: Tensor | None = None
    high: Tensor | None = None

    @torch.no_grad()
    def add(
        self,
        w: DirectionWeights,
        x: Sequence[Tensor],
        before: Sequence[Tensor],
        hidden: Sequence[Tensor],
        cell: Sequence[Tensor],
    ) -> None:
        """Adds the steps of one call: inputs, states before, states after, cell states after."""
        self.weights = w
        self.hidden += hidden
        self.cell += cell
        name = self.spec.name
        for gate, values in measures.gate_activations(
            name, torch.cat([*x]), torch.cat([*before]), w
        ).items():
            count = measures.count_saturated(name, gate, values)
            self.saturated[gate] = self.saturated.get(gate, 0) + count
        outputs = torch.cat([*hidden])
        low, high = outputs.amin(0), outputs.amax(0)
        self.low = low if self.low is None else torch.minimum(self.low, low)
        self.high = high if self.high is None else torch.maximum(self.high, high)
        self.rows += outputs.shape[0]


class Recorder:
    """The backend, and the records of all layers by name."""

    NAME = "diagnostics"
    WHOLE_STACK = False

    def __init__(self) -> None:
        self.records: dict[str, Record] = {}
        # per thread, because a call in another thread does not belong to the model
        self._current = threading.local()

    def choose(self, call: LayerCall, backends: Sequence[Backend]) -> Backend:
        """Chooses this backend inside modules that `watch` watches, as a watcher of choices."""
        return self if getattr(self._current, "layers", None) is not None else composite

    def watch(self, module: nn.Module, name: str) -> Callable[[], None]:
        """Records the calls of a module from now on. Returns the function that ends this."""
        layers = layer_names(module, name)
        options = getattr(module, "_cell_options", None)
        heads = 1 if options is None else options.heads

        def begin(module: nn.Module, inputs: Any) -> None:
            if heads > 1:
                owner = name or type(module).__name__
                raise ValueError(f"diagnose: {owner} must have heads=1, got {heads}.")
            # a subclass may run its stack several times per call
            self._current.layers = itertools.cycle(layers)

        def end(module: nn.Module, inputs: Any, outputs: Any) -> None:
            self._current.layers = None

        handles = [
            module.register_forward_pre_hook(begin),
            module.register_forward_hook(end, always_call=True),
        ]

        def remove() -> None:
            for handle in handles:
                handle.remove()

        return remove

    def unsupported(self, call: LayerCall) -> str:
        return ""

    def run(self, call: LayerCall) -> Results:
        """Computes one layer, or one step, and records it."""
        if autocast.acts_on(call.x):  # the arguments have been cast already
            with torch.autocast(call.x.device.type, enabled=False):
                return self.run(call)
        names = next(self._current.layers)
        if call.x.dtype not in HALF:
            return self._run_any(call, names)
        y, h_n, c_n = self._run_any(_to_float(call), names)
        dtype = call.x.dtype
        return y.to(dtype), h_n.to(dtype), None if c_n is None else c_n.to(dtype)

    def _run_any(self, call: LayerCall, names: Sequence[str]) -> Results:
        if not call.is_step:
            return self._run_layer(call, names)
        c0 = None if call.c0 is None else call.c0.unsqueeze(0)
        x, h0 = call.x.unsqueeze(0), call.h0.unsqueeze(0)
        y, h_n, c_n = self._run_layer(call._replace(x=x, h0=h0, c0=c0), names)
        return y.squeeze(0), h_n.squeeze(0), None if c_n is None else c_n.squeeze(0)

    def _run_layer(self, call: LayerCall, names: Sequence[str]) -> Results:
        x, batch_sizes = call.x, call.batch_sizes
        if any(m is not None for m in call.sequence.named()._replace(batch_sizes=None)):
            raise RuntimeError(
                f"diagnose: {names[0]} must get padded or packed sequences without further tensors."
            )
        if not call.has_plain_cell:
            raise ValueError(
                f"diagnose: {names[0]} must have no layer_norm, zoneout or recurrent_dropout, and "
                "no other option of the cell."
            )
        batch = call.h0.shape[1]
        sizes = [batch] * x.shape[0] if batch_sizes is None else batch_sizes.tolist()
        if not sizes or not batch:
            raise ValueError(
                f"diagnose: the input of {names[0]} must have at least one step and one sequence, "
                f"got {len(sizes)} steps and {batch} sequences."
            )
        rows = x.unbind(0) if batch_sizes is None else torch.split(x, sizes)
        outputs, h_n, c_n = [], [], []
        count = len(call.weights.flat) // len(names)
        for direction, name in enumerate(names):
            weights = Weights(
                call.weights.flat[direction * count : (direction + 1) * count], call.weights.slots
            )
            c = None if call.c0 is None else call.c0[direction]
            one = call._replace(h0=call.h0[direction], c0=c, weights=weights)
            record = self.records.setdefault(name, Record(call.spec))
            hidden, h, c = _run_direction(record, one, rows, direction == 1)
            outputs.append(torch.stack(hidden) if batch_sizes is None else torch.cat(hidden))
            h_n.append(h)
            if c is not None:
                c_n.append(c)
        return torch.cat(outputs, -1), torch.stack(h_n), torch.stack(c_n) if c_n else None


def layer_names(module: nn.Module, name: str) -> list[list[str]]:
    """Returns the names of each layer's directions, such as ``encoder.l0_reverse``."""
    if not isinstance(module, nn.RNNBase):
        return [[name or type(module).__name__]]
    prefix = f"{name}." if name else ""
    suffixes = ["", "_reverse"] if module.bidirectional else [""]
    return [[f"{prefix}l{k}{suffix}" for suffix in suffixes] for k in range(module.num_layers)]


def _run_direction(
    record: Record, call: LayerCall, rows: Sequence[Tensor], is_reverse: bool
) -> tuple[list[Tensor], Tensor, Tensor | None]:
    """Runs one direction from the states h0 [B,R] and c0 of ``call``; ``rows`` are its inputs.

    Returns:
        The state h after each step, in the order of time, and the last states.
    """
    # in a frozen model, states need a gradient from the first one on
    h = _requiring_gradient(call.h0)
    c = None if call.c0 is None else _requiring_gradient(call.c0)
    [w] = call.weights.directions()
    step = STEPS[call.spec.name]
    before: list[Tensor] = []
    hidden: list[Tensor] = []
    cell: list[Tensor] = []
    for x in reversed(rows) if is_reverse else rows:
        active = x.shape[0]
        h_active = h[:active]
        gates_h = None if w.w_hh is None else linear(h_active, w.w_hh, w.b_hh)
        c_next = None if c is None else c[:active]
        h_next, c_next = step(linear(x, w.w_ih, w.b_ih), gates_h, h_active, c_next, w.w_unit)
        if w.w_hr is not None:
            h_next = linear(h_next, w.w_hr)
        h_next = _requiring_gradient(h_next)  # no change unless called under no_grad
        before.append(h_active)
        hidden.append(h_next)
        # rows that are not active keep their state, as in `reference_layer`
        h = torch.cat([h_next, h[active:]])
        if c is not None and c_next is not None:
            c_next = _requiring_gradient(c_next)
            cell.append(c_next)
            c = torch.cat([c_next, c[active:]])
    if is_reverse:
        for steps in (before, hidden, cell):
            steps.reverse()
    record.add(w, rows, before, hidden, cell)
    return hidden, h, c


def _requiring_gradient(state: Tensor) -> Tensor:
    """Returns the state itself if it requires a gradient, else a leaf with its values."""
    return state if state.requires_grad else state.detach().requires_grad_()


def _to_float(call: LayerCall) -> LayerCall:
    return call._replace(
        x=call.x.float(),
        h0=call.h0.float(),
        c0=None if call.c0 is None else call.c0.float(),
        weights=call.weights._replace(flat=[w.float() for w in call.weights.flat]),
    )


def watched_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yields the recurrent layers and cells of a model, each under its first name."""
    for name, module in model.named_modules():
        if isinstance(module, nn.RNNBase | nn.RNNCellBase):
            yield name, module

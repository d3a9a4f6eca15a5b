"""Random layers over padded batches with lengths and resets, and their definition."""

from __future__ import annotations

from typing import Any

import torch
from tolerance import Change
from torch import Tensor

from fastrnn.layer_call import PADDED, LayerCall
from fastrnn.ops import composite_layer
from fastrnn.ops.segments import Ragged, run_composed
from fastrnn.spec import CELLS, WEIGHT_SLOTS, Weights, present

F64 = torch.float64
KINDS = ["none", "lengths", "resets", "lengths, resets to a state", "resets to a state each step"]
#: T, B, I, H, P and the lengths
SIZES = (5, 4, 3, 4, 2)
LENGTHS = (5, 0, 2, 3)


def arguments(
    cell: str,
    kind: str,
    projected: bool = False,
    directions: int = 1,
    dtype: torch.dtype = F64,
    sizes: tuple[int, int, int, int, int] = SIZES,
) -> dict[str, Any]:
    """Returns random arguments of ``ragged_layer``."""
    spec = CELLS[cell]
    steps, batch, inputs, hidden, proj = sizes
    generator = torch.Generator().manual_seed(3)

    def new(*shape: int) -> Tensor:
        value = 0.5 * torch.randn(shape, generator=generator, dtype=F64)
        return value.to(dtype).requires_grad_()

    size = proj if projected else hidden
    slots = spec.slots(True, projected)
    shapes = {
        "w_ih": (spec.gates * hidden, inputs),
        "w_hh": (spec.gates * hidden, size),
        "b_ih": (spec.gates * hidden,),
        "b_hh": (spec.gates * hidden,),
        "w_hr": (proj, hidden),
        "w_unit": (spec.parameters * hidden,),
    }
    names = [WEIGHT_SLOTS[slot] for slot in present(slots)]
    before = (steps,) if "each" in kind else ()
    cells = (directions, batch, spec.cell_states * hidden)
    has_state, has_c = "state" in kind, spec.has_cell_state
    resets = None
    if "resets" in kind:
        resets = torch.rand(steps, batch, generator=generator) < 0.4
        resets[:1, 0] = True
    lengths = torch.tensor([LENGTHS[b % len(LENGTHS)] for b in range(batch)])
    return {
        "x": new(steps, batch, inputs),
        "h0": new(directions, batch, size),
        "c0": new(*cells) if has_c else None,
        "weights": [new(*shapes[name]) for _ in range(directions) for name in names],
        "slots": slots,
        "lengths": lengths if "lengths" in kind else None,
        "resets": resets,
        "reset_h": new(*before, directions, batch, size) if has_state else None,
        "reset_c": new(*before, *cells) if has_state and has_c else None,
        "cell": cell,
    }


def call_of(given: dict[str, Any]) -> tuple[LayerCall, Ragged]:
    call = LayerCall(
        CELLS[given["cell"]],
        given["x"],
        PADDED,
        given["h0"],
        given["c0"],
        Weights(given["weights"], given["slots"]),
    )
    return call, Ragged(*(given[name] for name in Ragged._fields))


def composed(given: dict[str, Any]) -> list[Tensor]:
    """Runs the layer by differentiable operations of torch."""
    return [t for t in run_composed(*call_of(given), composite_layer) if t is not None]


def leaves(given: dict[str, Any]) -> list[Tensor]:
    named = [given[name] for name in ("x", "h0", "c0", "reset_h", "reset_c")]
    return [t for t in [*named, *given["weights"]] if t is not None]


def weights_for(output: Tensor) -> Tensor:
    weights = torch.linspace(0.5, 1, output.numel(), dtype=output.dtype, device=output.device)
    return weights.view_as(output)


def with_gradients(outputs: list[Tensor], given: dict[str, Any]) -> list[Tensor]:
    loss: Any = sum((o * weights_for(o)).sum() for o in outputs)
    return [*outputs, *torch.autograd.grad(loss, leaves(given), materialize_grads=True)]


def composed_exactly(change: Change, given: dict[str, Any]) -> tuple[Tensor, ...]:
    """Returns results and gradients of the layer by torch, computed with changed arguments."""
    wide = {
        name: [change(w).requires_grad_() for w in value]
        if name == "weights"
        else change(value).requires_grad_()
        if isinstance(value, Tensor) and value.is_floating_point()
        else value
        for name, value in given.items()
    }
    return tuple(with_gradients(composed(wide), wide))

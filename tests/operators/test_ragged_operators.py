"""The operators of padded batches with lengths and resets, for every cell of the registry."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from marks import (
    KINDS,
    SIZES,
    arguments,
    call_of,
    composed,
    leaves,
    weights_for,
    with_gradients,
)
from support import PACKED
from tolerance import assert_same_in_double
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from fastrnn.ops import kernel_layer
from fastrnn.ops.ragged import gradients_by_parts
from fastrnn.ops.segments import run_composed
from fastrnn.spec import BUILT_IN, CELLS

pytestmark = pytest.mark.usefixtures("one_thread")

F64 = torch.float64
T, B, I, H, P = SIZES  # noqa: E741 - the sizes' names
CASES = [(cell, projected) for cell in BUILT_IN for projected in {False, CELLS[cell].projects}]
every_case = pytest.mark.parametrize(("cell", "projected"), CASES)
every_kind = pytest.mark.parametrize("kind", KINDS)
operators = torch.ops.fastrnn


def by_operator(given: dict[str, Any]) -> list[Tensor]:
    y, h_n, c_n = operators.ragged_layer(*given.values())
    return [y, h_n] if given["c0"] is None else [y, h_n, c_n]


@every_kind
@pytest.mark.parametrize("directions", [1, 2])
@every_case
def test_matches_composition(cell: str, projected: bool, directions: int, kind: str) -> None:
    given = arguments(cell, kind, projected, directions)
    found, expected = (with_gradients(run(given), given) for run in (by_operator, composed))
    assert_same_in_double(found, expected)
    with torch.no_grad():
        assert_same_in_double(by_operator(given), composed(given))


@pytest.mark.parametrize("kind", KINDS[3:])
@every_case
def test_gradcheck(cell: str, projected: bool, kind: str) -> None:
    given = arguments(cell, kind, projected, 2)
    names = ("x", "h0", "c0", "reset_h", "reset_c")

    def call(*tensors: Tensor) -> tuple[Tensor, ...]:
        rest = iter(tensors)
        own = {name: None if given[name] is None else next(rest) for name in names}
        return tuple(by_operator({**given, **own, "weights": list(rest)}))

    assert torch.autograd.gradcheck(call, leaves(given), fast_mode=True)
    if kind == KINDS[3]:
        assert torch.autograd.gradgradcheck(call, leaves(given), fast_mode=True)


#: those whose forward pass runs packed rows, which these gradients read
PACKED_CASES = [
    (cell, projected, kind)
    for cell, projected in CASES
    for kind in KINDS
    if CELLS[cell].parameters > 0 or "lengths" in kind or kind == "none"
]


@pytest.mark.parametrize("directions", [1, 2])
@pytest.mark.parametrize(("cell", "projected", "kind"), PACKED_CASES)
def test_gradients_by_parts_match_composition(
    cell: str, projected: bool, directions: int, kind: str
) -> None:
    """The gradients that are composed of other operators serve every cell."""
    given = arguments(cell, kind, projected, directions)
    outputs = -1
    with torch.no_grad():
        y, h_n, c_n, saved = operators.ragged_forward(*given.values(), outputs)
    results = [y, h_n] if given["c0"] is None else [y, h_n, c_n]
    d_outputs = [weights_for(o) for o in results]
    d_outputs += [None] * (3 - len(d_outputs))
    *marks, name = list(given.values())
    needs = [given[key] is not None for key in ("x", "h0", "c0", "reset_h", "reset_c")]
    needs += [True] * len(given["weights"])
    own = gradients_by_parts(*d_outputs, *marks, y, saved, name, needs)
    assert_same_in_double(own, with_gradients(composed(given), given)[len(results) :])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", KINDS[1:])
def test_half_types_match_the_packed_operator(kind: str, dtype: torch.dtype) -> None:
    given = arguments("lstm", kind, False, 2, dtype)
    found = operators.ragged_forward(*given.values(), -1)
    expected = run_composed(*call_of(given), kernel_layer)
    for own, other in zip(found[:3], expected, strict=True):
        assert own.dtype == dtype
        assert torch.equal(own, other)
    for t in with_gradients(by_operator(given), given):
        assert t.dtype == dtype
        assert t.isfinite().all()


@pytest.mark.parametrize("kind", [KINDS[1], KINDS[3]])
@pytest.mark.parametrize("cell", ["lstm", "gru", "peephole_lstm"])
def test_opcheck(cell: str, kind: str) -> None:
    given = arguments(cell, kind, cell == "lstm", 2)
    checks = (
        "test_schema",
        "test_faketensor",
        "test_autograd_registration",
        "test_aot_dispatch_static",
    )
    if CELLS[cell].parameters == 0:
        torch.library.opcheck(
            operators.ragged_layer.default, tuple(given.values()), test_utils=checks
        )
    for t in leaves(given):
        t.requires_grad_(False)
    checks = ["test_schema", "test_faketensor"]
    torch.library.opcheck(
        operators.ragged_forward.default, (*given.values(), -1), test_utils=checks
    )
    y, h_n, c_n, saved = operators.ragged_forward(*given.values(), -1)
    *marks, name = given.values()
    d_outputs = (y, h_n, None if given["c0"] is None else c_n)
    if CELLS[cell].parameters == 0:
        torch.library.opcheck(
            operators.ragged_gradients.default,
            (*d_outputs, *marks, y, saved, name, -1),
            test_utils=checks,
        )
    needs = [given[key] is not None for key in ("x", "h0", "c0", "reset_h", "reset_c")]
    needs += [True] * len(given["weights"])
    torch.library.opcheck(
        operators.ragged_gradients_by_parts.default,
        (*d_outputs, *marks, y, saved, name, needs),
        test_utils=checks,
    )


def test_sizes_do_not_depend_on_values() -> None:
    for projected in (False, True):
        sizes = set()
        for lengths in ([T] * B, [1, 2, 0, 3], [0] * B):
            given = arguments("lstm", "lengths, resets", projected, 2)
            given["lengths"] = torch.tensor(lengths)
            y, h_n, c_n, saved = operators.ragged_forward(*given.values(), -1)
            *marks, name = given.values()
            d = operators.ragged_gradients(y, h_n, c_n, *marks, y, saved, name, -1)
            sizes.add(tuple(tuple(t.shape) for t in (y, h_n, c_n, saved, *d)))
            assert not any(t.isnan().any() for t in (y, h_n, c_n, *d))
        assert len(sizes) == 1


def test_no_rows_and_no_steps() -> None:
    for steps, batch in ((0, B), (T, 0), (0, 0)):
        given = arguments("gru", "lengths, resets to a state", directions=2)
        given["x"] = torch.randn(steps, batch, I, dtype=F64, requires_grad=True)
        for name in ("h0", "reset_h"):
            given[name] = given[name][:, :batch].detach().requires_grad_()
        given["lengths"] = torch.zeros(batch, dtype=torch.int64)
        given["resets"] = torch.zeros(steps, batch, dtype=torch.bool)
        y, h_n = by_operator(given)
        assert y.shape == (steps, batch, 2 * H)
        assert torch.equal(h_n, given["h0"])
        d_x, d_h0, *rest = torch.autograd.grad(h_n.sum() + y.sum(), leaves(given))
        assert torch.equal(d_h0, torch.ones_like(d_h0))
        assert not any(t.any() for t in (d_x, *rest))


def shrunk(t: Tensor) -> Tensor:
    t = t.detach().clone()
    t.untyped_storage().resize_(8)
    return t


LENGTHS = torch.tensor([T, 0, 2, 3])
RESETS = torch.zeros(T, B, dtype=torch.bool)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"lengths": LENGTHS + 1}, f"lengths must be from 0 to the {T} steps of x, got {T + 1}"),
        ({"lengths": LENGTHS - 1}, f"lengths must be from 0 to the {T} steps of x, got -1"),
        ({"lengths": LENGTHS.int()}, "lengths must be 1-D int64 on the CPU"),
        ({"lengths": LENGTHS.double()}, "lengths must be 1-D int64 on the CPU"),
        ({"lengths": LENGTHS[:3]}, r"lengths must have the shape \[4\], got \[3\]"),
        ({"lengths": LENGTHS.to("meta")}, "lengths must be 1-D int64 on the CPU|must be on"),
        ({"lengths": shrunk(LENGTHS)}, "lengths must have memory for all of its 4 values"),
        ({"resets": RESETS[:4]}, r"resets must have the shape \[5, 4\], got \[4, 4\]"),
        ({"resets": RESETS.int()}, "resets must be 2-D bool or float64 on the CPU"),
        ({"resets": RESETS + 0.5}, "resets must be 2-D bool or float64 on the CPU"),
        ({"resets": RESETS.double() + 2}, "resets must hold only 0 and 1, got another value"),
        ({"resets": shrunk(RESETS)}, "resets must have memory for all of its 20 values"),
        ({"reset_h": torch.zeros(1, B, H)}, "reset_h must have the dtype Double of the input"),
        (
            {"reset_h": torch.zeros(1, B, H + 1, dtype=F64)},
            r"reset_h must have the shape \[1, 4, 4\]",
        ),
        ({"reset_h": torch.zeros(T + 1, 1, B, H, dtype=F64)}, "reset_h must have the shape"),
        ({"reset_h": shrunk(torch.zeros(1, B, H, dtype=F64))}, "reset_h must have memory"),
        ({"reset_c": torch.zeros(1, B, H, dtype=F64)}, "reset_c must not be given for gru"),
        ({"h0": torch.zeros(B, H, dtype=F64)}, "h0 must be .D, B, R.|with a 2-D h0"),
        ({"x": torch.zeros(T, B + 1, I, dtype=F64)}, "x must have the batch 4 of h0, got 5"),
        ({"x": torch.zeros(T, B, I + 1, dtype=F64)}, "x must have the input size 3 of w_ih"),
        ({"slots": 15 | PACKED}, "with batch_sizes|sequence must hold"),
        ({"cell": "none"}, "cell must be one of"),
    ],
)
def test_wrong_arguments_raise(changed: dict[str, Any], message: str) -> None:
    given = {**arguments("gru", "resets"), **changed}
    with torch.no_grad(), pytest.raises(RuntimeError, match=f"^fastrnn: .*({message})"):
        operators.ragged_forward(*given.values(), 7)
    whole = arguments("gru", "resets")
    with torch.no_grad():
        y, h_n, _, saved = operators.ragged_forward(*whole.values(), -1)
        *marks, name = given.values()
        with pytest.raises(RuntimeError, match=f"^fastrnn: .*({message})"):
            operators.ragged_gradients(y, h_n, None, *marks, y, saved, name, -1)


def test_gradients_of_wrong_tensors_raise() -> None:
    given = arguments("lstm", "lengths")
    with torch.no_grad():
        y, h_n, c_n, saved = operators.ragged_forward(*given.values(), -1)
        *marks, name = given.values()
        own = {"d_y": y, "d_h_n": h_n, "d_c_n": c_n, "y": y, "saved": saved}
        for key in own:
            for wrong in (shrunk(own[key]), own[key][..., 1:], own[key].float()):
                changed = {**own, key: wrong}
                d_y, d_h_n, d_c_n, output, kept = changed.values()
                with pytest.raises(RuntimeError, match=f"^fastrnn: {key} must "):
                    operators.ragged_gradients(d_y, d_h_n, d_c_n, *marks, output, kept, name, -1)


def test_flops_are_those_of_the_rows_that_exist() -> None:
    given = arguments("gru", "lengths, resets")
    for t in leaves(given):
        t.requires_grad_(False)
    with FlopCounterMode(display=False) as counter:
        operators.ragged_layer(*given.values())
    assert counter.get_total_flops() == 2 * int(LENGTHS.sum()) * 3 * H * (I + H)
    given["lengths"] = None
    with FlopCounterMode(display=False) as counter:
        operators.ragged_layer(*given.values())
    assert counter.get_total_flops() == 2 * T * B * 3 * H * (I + H)

"""The operator ``scan_layer`` of `MinGRU`, `MinLSTM` and `SRU`, compared with its composite."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tolerance import Change, assert_agrees, assert_same_in_double
from torch import Tensor
from torch.autograd import forward_ad

from fastrnn import _C
from fastrnn.ops import ScanCall, ScanInputs, composite_scan_layer, scan_layer

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
GATES = {"min_gru": 2, "min_lstm": 3, "sru": 4}
#        cell, positive, x
KINDS = [
    ("min_gru", False, False),
    ("min_gru", True, False),
    ("min_lstm", False, False),
    ("min_lstm", True, False),
    ("sru", False, False),
    ("sru", False, True),
]


def make(
    kind: tuple[str, bool, bool],
    steps: int,
    batch: int,
    units: int,
    dtype: torch.dtype = torch.float64,
    marks: bool = False,
    reverse: bool = False,
) -> tuple[ScanCall, ScanInputs]:
    cell, positive, has_x = kind
    generator = torch.Generator().manual_seed(steps + units)

    def draw(*sizes: int) -> Tensor:
        return torch.randn(sizes, generator=generator, dtype=torch.float64).to(dtype)

    lengths = torch.randint(0, steps + 1, (batch,), generator=generator) if marks else None
    resets = torch.rand(steps, batch, generator=generator) < 0.3 if marks else None
    width = (GATES[cell] - has_x) * units
    inputs = ScanInputs(
        draw(steps, batch, width),
        draw(width),
        draw(steps, batch, units) if has_x else None,
        draw(batch, units),
        draw(steps if units % 2 else 1, batch, units) if marks else None,
    )
    return ScanCall(cell, positive, reverse, lengths, resets), inputs


def operator(call: ScanCall, inputs: ScanInputs, saves: bool = False) -> Any:
    pre, bias, x, h0, reset_h = inputs
    return torch.ops.fastrnn.scan_layer(
        *(pre, bias, x, h0, call.lengths, call.resets, reset_h),
        *(call.cell, call.positive, call.reverse, saves),
    )


def with_gradients(function: Any, call: ScanCall, inputs: ScanInputs) -> list[Tensor]:
    leaves = [None if t is None else t.detach().clone().requires_grad_() for t in inputs]
    y, h_n = function(call, ScanInputs(*leaves))[:2]
    weight = torch.linspace(0.5, 1.5, y.numel(), dtype=torch.float64).to(y.dtype).view_as(y)
    wanted = [t for t in leaves if t is not None]
    gradients = torch.autograd.grad((y, h_n), wanted, (weight, weight.sum(0)))
    return [y.detach(), h_n.detach(), *gradients]


def composite_in(dtype: torch.dtype, call: ScanCall, inputs: ScanInputs) -> list[Tensor]:
    """Half types compute in float32."""
    wide = torch.promote_types(dtype, torch.float32)
    own = ScanInputs(*[None if t is None else t.to(wide) for t in inputs])
    return [t.to(dtype) for t in with_gradients(composite_scan_layer, call, own)]


def compare(call: ScanCall, inputs: ScanInputs, got: list[Tensor]) -> None:
    def exact(change: Change) -> list[Tensor]:
        own = ScanInputs(*[None if t is None else change(t) for t in inputs])
        return with_gradients(composite_scan_layer, call, own)

    assert_agrees(got, composite_in(inputs.pre.dtype, call, inputs), exact)


@pytest.mark.parametrize("isa", _C.available_isas())
@pytest.mark.parametrize("marks", [False, True])
@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_agrees_with_torch(
    dtype: torch.dtype, kind: tuple[str, bool, bool], marks: bool, isa: str
) -> None:
    for steps, batch, units in ((7, 3, 5), (6, 2, 70), (1, 1, 33)):
        for reverse in (False, True):
            call, inputs = make(kind, steps, batch, units, dtype, marks, reverse)
            _C.set_isa(isa)
            try:
                got = with_gradients(scan_layer, call, inputs)
            finally:
                _C.set_isa("")
            compare(call, inputs, got)


@pytest.mark.parametrize("kind", KINDS[::2], ids=str)
def test_results_that_are_stored_past_the_cache(kind: tuple[str, bool, bool]) -> None:
    """A batch that is large enough for it, and the first sequences of it."""
    call, inputs = make(kind, 50, 512, 128, torch.float32)
    pre, bias, x, h0, _ = inputs
    part = ScanInputs(pre[:, :7], bias, x, h0[:7], None)
    whole, few = operator(call, inputs, saves=True), operator(call, part, saves=True)
    assert 4 * (pre.numel() + whole[0].numel()) > 32 * 2**20
    assert torch.equal(whole[0][:, :7], few[0])
    assert torch.equal(whole[1][:7], few[1])

    def gradients(own: ScanInputs, results: Any) -> Any:
        y, _, states = results
        pre, bias, x, h0, _ = own
        kept = states if call.cell == "sru" else y
        return torch.ops.fastrnn.scan_layer_gradients(
            torch.ones_like(y), None, pre, bias, x, kept, h0, None, None, None, *call[:3]
        )

    d_pre, _, d_h0, _ = gradients(inputs, whole)
    d_pre_few, _, d_h0_few, _ = gradients(part, few)
    assert torch.equal(d_pre[:, :7], d_pre_few)
    assert torch.equal(d_h0[:7], d_h0_few)


@pytest.mark.parametrize("marks", [False, True])
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_derivatives_of_first_and_second_order(kind: tuple[str, bool, bool], marks: bool) -> None:
    call, inputs = make(kind, 4, 2, 3, marks=marks)
    leaves = [t.requires_grad_() for t in inputs if t is not None]

    def function(*own: Tensor) -> tuple[Tensor, Tensor]:
        rest = iter(own)
        return scan_layer(call, ScanInputs(*[None if t is None else next(rest) for t in inputs]))

    assert torch.autograd.gradcheck(function, leaves, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(function, leaves)


def test_dual_tensors() -> None:
    call, inputs = make(KINDS[0], 4, 2, 3)
    with forward_ad.dual_level():
        dual = inputs._replace(h0=forward_ad.make_dual(inputs.h0, torch.ones_like(inputs.h0)))
        tangents = [
            forward_ad.unpack_dual(function(call, dual)[0]).tangent
            for function in (scan_layer, composite_scan_layer, operator)
        ]
    assert_same_in_double(tangents[0], tangents[1])
    assert_same_in_double(tangents[2], tangents[1])


def test_batched_gradients() -> None:
    call, inputs = make(KINDS[0], 4, 2, 3)
    pre = inputs.pre.requires_grad_()
    y = scan_layer(call, inputs)[0]
    d_y = torch.randn(5, *y.shape, dtype=y.dtype)
    (got,) = torch.autograd.grad(y, pre, d_y, is_grads_batched=True, retain_graph=True)
    assert_same_in_double(
        got, torch.stack([torch.autograd.grad(y, pre, d, retain_graph=True)[0] for d in d_y])
    )


@pytest.mark.parametrize("kind", KINDS[::2], ids=str)
def test_opcheck(kind: tuple[str, bool, bool]) -> None:
    call, inputs = make(kind, 5, 2, 3, marks=True)
    pre, bias, x, h0, reset_h = inputs
    own = [None if t is None else t.clone().requires_grad_() for t in inputs]
    rest = (call.cell, call.positive, call.reverse)
    arguments = (*own[:4], call.lengths, call.resets, own[4], *rest, False)
    torch.library.opcheck(torch.ops.fastrnn.scan_layer.default, arguments)
    y, h_n, states = operator(call, inputs, saves=True)
    kept = states if call.cell == "sru" else y
    arguments = (*(y, h_n, pre, bias, x, kept, h0, call.lengths, call.resets, reset_h), *rest)
    torch.library.opcheck(torch.ops.fastrnn.scan_layer_gradients.default, arguments)


def test_sizes_of_zero() -> None:
    for sizes in ((0, 2, 3), (4, 0, 3), (4, 2, 0)):
        call, inputs = make(KINDS[0], *sizes)
        got = with_gradients(scan_layer, call, inputs)
        assert_same_in_double(got, with_gradients(composite_scan_layer, call, inputs))


ONES = torch.ones(4, 2, 6)
WRONG: list[tuple[dict[str, Any], str]] = [
    ({"pre": torch.ones(4, 6)}, "pre must have 3 dimensions, got 2."),
    ({"pre": torch.ones(4, 2, 5)}, "pre must have a multiple of 2 columns, got 5."),
    ({"pre": ONES.int()}, "pre must be float16, bfloat16, float32 or float64, got"),
    ({"bias": torch.ones(5)}, r"bias must have the shape \[6\], got \[5\]."),
    ({"bias": torch.ones(6).double()}, "bias must have the dtype of pre, got"),
    ({"x": torch.ones(4, 2, 3)}, "x must not be given for min_gru, got a tensor."),
    ({"h0": torch.ones(2, 4)}, r"h0 must have the shape \[2, 3\], got \[2, 4\]."),
    ({"lengths": torch.ones(2)}, "lengths must have dtype int64, got"),
    ({"lengths": torch.ones(3).long()}, r"lengths must have the shape \[2\], got \[3\]."),
    ({"resets": torch.ones(4, 2)}, "resets must have dtype bool, got"),
    ({"reset_h": torch.ones(1, 2, 3)}, "reset_h must be given with resets, got it alone."),
    ({"cell": "gru"}, "cell must be one of min_gru, min_lstm, sru, got 'gru'."),
]


@pytest.mark.parametrize(("change", "message"), WRONG)
def test_the_operator_checks_its_arguments(change: dict[str, Any], message: str) -> None:
    names = ("pre", "bias", "x", "h0", "lengths", "resets", "reset_h", "cell")
    arguments = {"pre": ONES, "cell": "min_gru"} | change
    with pytest.raises(RuntimeError, match=f"fastrnn: {message}"):
        torch.ops.fastrnn.scan_layer(*[arguments.get(name) for name in names], False, False, False)


def test_lengths_beyond_the_steps_change_no_other_memory() -> None:
    """The operator compares lengths and resets; it takes no address from them."""
    call, inputs = make(KINDS[0], 5, 2, 3)
    big = torch.tensor([2**62, -(2**62)])
    got = operator(call._replace(lengths=big), inputs)
    expected = operator(call._replace(lengths=torch.tensor([5, 0])), inputs)
    assert torch.equal(got[0], expected[0])
    assert torch.equal(got[1], expected[1])

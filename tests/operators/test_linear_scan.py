"""``fastrnn.functional.linear_scan``: values, derivatives, capture, errors."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tolerance import assert_agrees, assert_same_in_double
from torch import Tensor
from torch.autograd import forward_ad

from fastrnn import _C
from fastrnn.functional import linear_scan
from fastrnn.ops.scan import _gradients_by_steps, scan_by_steps

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
# odd sizes; one step; rows longer than a buffer of states
SHAPES = [(7, 3, 5), (1, 1, 1), (12, 2, 35), (3, 2, 2100)]


def plain(a: Tensor, b: Tensor, h0: Tensor | None = None, reverse: bool = False) -> Tensor:
    """The definition, step by step."""
    steps = range(len(a))
    states: list[Tensor] = []
    h = torch.zeros_like(b[0]) if h0 is None else h0
    for t in reversed(steps) if reverse else steps:
        h = a[t] * h + b[t]
        states.append(h)
    return torch.stack(states[::-1] if reverse else states)


def inputs(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    a = torch.rand(shape, generator=generator, dtype=torch.float64)
    b = torch.randn(shape, generator=generator, dtype=torch.float64)
    h0 = torch.randn(shape[1:], generator=generator, dtype=torch.float64)
    return [t.to(dtype) for t in (a, b, h0)]


def with_gradients(function: Any, values: list[Tensor], reverse: bool) -> list[Tensor]:
    leaves = [t.detach().clone().requires_grad_() for t in values]
    h = function(*leaves, reverse=reverse)
    d_h = torch.linspace(0.5, 1.5, h.numel(), dtype=torch.float64).to(h.dtype).view_as(h)
    return [h, *torch.autograd.grad(h, leaves, d_h)]


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_agrees_with_the_definition(
    shape: tuple[int, ...], dtype: torch.dtype, reverse: bool
) -> None:
    values = inputs(*shape, dtype=dtype)

    def other() -> list[Tensor]:  # half types: the states stay in float32
        wide = torch.promote_types(dtype, torch.float32)
        return [t.to(dtype) for t in with_gradients(plain, [v.to(wide) for v in values], reverse)]

    assert_agrees(
        with_gradients(linear_scan, values, reverse),
        other(),
        lambda change: with_gradients(plain, [change(v) for v in values], reverse),
    )


@pytest.fixture
def many_threads() -> Any:
    before = torch.get_num_threads()
    torch.set_num_threads(8)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("isa", _C.available_isas())
@pytest.mark.parametrize("columns", [1, 3, 40, 70, 300])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_every_instruction_set(isa: str, columns: int, dtype: torch.dtype) -> None:
    values = inputs(9, columns, dtype=dtype)
    expected = with_gradients(linear_scan, values, False)
    _C.set_isa(isa)
    try:
        got = with_gradients(linear_scan, values, False)
    finally:
        _C.set_isa("")
    assert_agrees(
        got,
        expected,
        lambda change: with_gradients(plain, [change(v) for v in values], False),
    )


@pytest.mark.parametrize("reverse", [False, True])
def test_factors_whose_product_overflows(many_threads: None, reverse: bool) -> None:
    """The product of a chunk is infinite here; times a state of 0 it would be NaN."""
    a = torch.full((20_000, 8), 2.0)
    b = torch.zeros_like(a)
    assert torch.equal(linear_scan(a, b, reverse=reverse), b)


def test_infinities_and_nan_stay_where_they_are(many_threads: None) -> None:
    a, b, h0 = inputs(20_000, 8, dtype=torch.float32)
    b[5, 2], a[7, 3] = float("inf"), float("nan")
    got, expected = linear_scan(a, b, h0), plain(a, b, h0)
    torch.testing.assert_close(got.isnan(), expected.isnan())
    torch.testing.assert_close(got.isinf(), expected.isinf())


@settings(max_examples=40, deadline=None)
@given(
    steps=st.integers(0, 9),
    sizes=st.lists(st.integers(0, 40), max_size=2),
    has_state=st.booleans(),
    reverse=st.booleans(),
    transposed=st.booleans(),
)
def test_every_shape(
    steps: int, sizes: list[int], has_state: bool, reverse: bool, transposed: bool
) -> None:
    a, b, h0 = inputs(steps, *sizes)
    if transposed:  # the same numbers, not contiguous
        a, b = (t.movedim(0, -1).contiguous().movedim(-1, 0) for t in (a, b))
    got = linear_scan(a, b, h0 if has_state else None, reverse=reverse)
    assert got.shape == a.shape
    if steps > 0:
        assert_same_in_double(got, plain(a, b, h0 if has_state else None, reverse))


@pytest.mark.parametrize("which", list(itertools.product([False, True], repeat=3)), ids=str)
def test_gradients_of_some_inputs(which: tuple[bool, ...]) -> None:
    if not any(which):
        return
    leaves = [t.requires_grad_(w) for t, w in zip(inputs(6, 2, 3), which, strict=True)]
    own = [t for t in leaves if t.requires_grad]
    got = torch.autograd.grad(linear_scan(*leaves).square().sum(), own)
    expected = torch.autograd.grad(plain(*leaves).square().sum(), own)
    assert_same_in_double(got, expected)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("has_state", [False, True])
def test_derivatives_of_first_and_second_order(has_state: bool, reverse: bool) -> None:
    leaves = [t.requires_grad_() for t in inputs(4, 2, 2)[: 3 if has_state else 2]]

    def function(*args: Tensor) -> Tensor:
        return linear_scan(*args, reverse=reverse)

    assert torch.autograd.gradcheck(function, leaves, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(function, leaves)


def test_third_order() -> None:
    a, b, _ = inputs(4, 3)
    a.requires_grad_()

    def third(function: Any) -> Tensor:
        value = function(a, b).pow(3).sum()
        for _ in range(3):
            (value,) = torch.autograd.grad(value.sum(), a, create_graph=True)
        return value

    assert_same_in_double(third(linear_scan), third(plain))


def test_transforms() -> None:
    a, b, h0 = inputs(5, 3, 4)
    d_a = torch.ones_like(a)
    got = torch.func.jvp(lambda a: linear_scan(a, b, h0), (a,), (d_a,))
    assert_same_in_double(got, torch.func.jvp(lambda a: plain(a, b, h0), (a,), (d_a,)))
    got = torch.func.vmap(linear_scan, in_dims=(1, None, 0))(a, b[:, 0], h0)
    expected = torch.stack([plain(a[:, i], b[:, 0], h0[i]) for i in range(3)])
    assert_same_in_double(got, expected)

    def loss(function: Any) -> Any:
        return lambda a, b: function(a, b).square().sum()

    for transform in (torch.func.grad, torch.func.hessian, torch.func.jacrev):
        assert_same_in_double(transform(loss(linear_scan))(a, b), transform(loss(plain))(a, b))
    per_sample = torch.func.vmap(torch.func.grad(loss(linear_scan)), in_dims=(1, 1))
    expected = torch.stack([torch.func.grad(loss(plain))(a[:, i], b[:, i]) for i in range(3)])
    assert_same_in_double(per_sample(a, b), expected)


def test_dual_tensors() -> None:
    a, b, h0 = inputs(5, 3)
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(h0, torch.ones_like(h0))
        tangent = forward_ad.unpack_dual(linear_scan(a, b, dual)).tangent
        h = torch.ops.fastrnn.linear_scan(a, b, dual, False)
        from_operator = forward_ad.unpack_dual(h).tangent
        assert (
            forward_ad.unpack_dual(torch.ops.fastrnn.linear_scan(a, b, h0, False)).tangent is None
        )
    assert_same_in_double(tangent, a.cumprod(0))
    assert_same_in_double(from_operator, a.cumprod(0))


def test_opcheck() -> None:
    a, b, h0 = (t.requires_grad_() for t in inputs(5, 2, 3))
    for state, reverse in ((None, False), (h0, True)):
        torch.library.opcheck(torch.ops.fastrnn.linear_scan.default, (a, b, state, reverse))
    h = linear_scan(a, b, h0)
    values = [t.detach() for t in (torch.ones_like(h), a, h)]
    for needs_a in (False, True):
        arguments = (*values, h0.detach(), False, needs_a)
        torch.library.opcheck(torch.ops.fastrnn.linear_scan_gradients.default, arguments)


def test_compiled_with_gradients() -> None:
    values = inputs(6, 2, 3)
    compiled = torch.compile(linear_scan, fullgraph=True)
    assert_same_in_double(
        with_gradients(compiled, values, True), with_gradients(linear_scan, values, True)
    )


def test_exported() -> None:
    class Model(torch.nn.Module):
        def forward(self, a: Tensor, b: Tensor) -> Tensor:
            return linear_scan(a.sigmoid(), b)

    a, b, _ = inputs(6, 2, 3)
    steps = torch.export.Dim("steps", min=2)
    program = torch.export.export(Model(), (a, b), dynamic_shapes=({0: steps}, {0: steps}))
    longer = inputs(9, 2, 3)[:2]
    assert_same_in_double(program.module()(*longer), Model()(*longer))


@pytest.mark.filterwarnings(
    "error", "ignore::DeprecationWarning", "ignore:`torch.jit:FutureWarning"
)
def test_traced_and_saved(tmp_path: Path) -> None:
    class Model(torch.nn.Module):
        def forward(self, a: Tensor, b: Tensor) -> Tensor:
            return linear_scan(a.sigmoid(), b)

    a, b, _ = inputs(6, 2, 3)
    path = str(tmp_path / "model.pt")
    torch.jit.trace(Model(), (a.requires_grad_(), b)).save(path)
    longer = inputs(9, 2, 3)[:2]
    assert_same_in_double(torch.jit.load(path)(*longer), Model()(*longer))


def test_the_final_state_continues_a_sequence() -> None:
    a, b, h0 = inputs(8, 2, 3)
    first = linear_scan(a[:5], b[:5], h0)
    second = linear_scan(a[5:], b[5:], first[-1])
    assert_same_in_double(torch.cat([first, second]), linear_scan(a, b, h0))


def test_autocast_casts_to_the_widest_type() -> None:
    a, b, h0 = inputs(4, 2, 3, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        assert linear_scan(a.bfloat16(), b.bfloat16()).dtype == torch.bfloat16
        assert linear_scan(a.bfloat16(), b.bfloat16(), h0).dtype == torch.float32


def test_shapes_on_meta_tensors() -> None:
    a = torch.empty(5, 2, 3, device="meta")
    assert linear_scan(a, a, a[0]).shape == a.shape


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"a": [1.0]}, TypeError, "linear_scan: a must be a tensor, got a list of 1."),
        ({"b": None}, TypeError, "linear_scan: b must be a tensor, got None."),
        ({"h0": 1}, TypeError, "linear_scan: h0 must be a tensor, got 1."),
        ({"reverse": 1}, TypeError, "linear_scan: reverse must be a bool, got 1."),
        ({"a": torch.tensor(1.0)}, RuntimeError, "a must have a dimension of steps, got a scalar."),
        (
            {"a": torch.ones(4, 2, 3, dtype=torch.int64)},
            RuntimeError,
            "a must be float16, bfloat16, float32 or float64, got torch.int64.",
        ),
        (
            {"b": torch.ones(4, 2)},
            RuntimeError,
            r"b must have the shape \[4, 2, 3\], got \[4, 2\].",
        ),
        (
            {"h0": torch.ones(1, 2, 3)},
            RuntimeError,
            r"h0 must have the shape \[2, 3\], got \[1, 2, 3\].",
        ),
        (
            {"b": torch.ones(4, 2, 3).double()},
            RuntimeError,
            "b must have the dtype torch.float32, got torch.float64.",
        ),
        (
            {"b": torch.ones(4, 2, 3, device="meta")},
            RuntimeError,
            "b must be on cpu, got meta.",
        ),
        ({"a": torch.ones(4, 2, 3).to_sparse()}, RuntimeError, "tensors must be dense"),
    ],
)
def test_wrong_arguments(change: dict[str, Any], error: type, message: str) -> None:
    arguments: dict[str, Any] = {"a": torch.ones(4, 2, 3), "b": torch.ones(4, 2, 3)} | change
    with pytest.raises(error, match=message):
        linear_scan(**arguments)


def test_the_operator_checks_its_own_arguments() -> None:
    a = torch.ones(4, 3)
    with pytest.raises(RuntimeError, match=r"fastrnn: b must have the shape \[4, 3\], got \[4\]."):
        torch.ops.fastrnn.linear_scan(a, a[:, 0], None, False)
    small = torch.ones(4, 3)
    small.untyped_storage().resize_(8)
    with pytest.raises(RuntimeError, match="b must have memory for all of its 12 values"):
        torch.ops.fastrnn.linear_scan(a, small, None, False)


ONES = torch.ones(4, 3)
WRONG_ARGUMENTS = [
    ({"b": ONES[:, 0]}, r"b must have the shape \[4, 3\], got \[4\]."),
    ({"b": ONES.double()}, "b must have the dtype of a."),
    ({"b": ONES.to("meta")}, "b must be on the device of a."),
    ({"h0": ONES}, r"h0 must have the shape \[3\], got \[4, 3\]."),
    ({"a": ONES.int()}, "a must be float16, bfloat16, float32 or float64, got torch.int32."),
    ({"a": torch.tensor(1.0)}, "a must have one dimension or more, got none."),
]


@pytest.mark.parametrize(("change", "message"), WRONG_ARGUMENTS)
def test_the_code_without_a_kernel_checks_its_arguments(
    change: dict[str, Tensor], message: str
) -> None:
    """The implementation for CUDA, which runs on every device."""
    t = {"a": ONES, "b": ONES, "h0": ONES[0]} | change
    with pytest.raises(RuntimeError, match=f"fastrnn: {message}"):
        scan_by_steps(t["a"], t["b"], t["h0"], False)
    with pytest.raises(RuntimeError, match=f"fastrnn: {message.replace('b must', 'h must')}"):
        _gradients_by_steps(ONES, t["a"], t["b"], t["h0"], False, True)

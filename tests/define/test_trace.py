"""Errors of `fastrnn.define_cell`: one sentence with the line of the user's function."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.nn import functional

import fastrnn

OUTSIDE = torch.ones(3)


def gate(step: Callable[[Any, Any], Any]) -> Callable[..., Any]:
    def whole(gates_x: Any, gates_h: Any, h: Any) -> Any:
        return step(gates_x[0] + gates_h[0], h)

    return whole


def branch(g: Any, h: Any) -> Any:
    if g > h:
        return g
    return h


def loop(g: Any, h: Any) -> Any:
    total = g
    for part in h:
        total = total + part
    return total


def changed(g: Any, h: Any) -> Any:
    h[0] = g
    return h


def attribute(g: Any, h: Any) -> Any:
    h.data = g
    return h


def in_place(g: Any, h: Any) -> Any:
    h *= 0.5
    return h + g


WRONG: dict[str, tuple[Callable[[Any, Any], Any], str]] = {
    "cumsum": (lambda g, h: torch.cumsum(g, 0), "torch's cumsum cannot be fused"),
    "softmax": (lambda g, h: g.softmax(0), "softmax must have dim=-1 and keepdim=True, got dim=0"),
    "softmax of a type": (
        lambda g, h: torch.softmax(g, -1, dtype=torch.float64),
        "dtype of softmax must be None, got torch.float64",
    ),
    "sum": (lambda g, h: h + g.sum(-1), "sum must have dim=-1 and keepdim=True, got dim=-1 and"),
    "sum of all": (lambda g, h: h + g.sum(), "got dim=None and keepdim=False"),
    "sum of a sum": (
        lambda g, h: h + g.mean(-1, True).sum(-1, True),
        "a reduction over the units must have a tensor [B,H]",
    ),
    "correction": (
        lambda g, h: h * g.var(-1, correction=2, keepdim=True),
        "correction of var must be 0 or 1, got 2",
    ),
    "amax": (lambda g, h: h + g.amax(-1, True), "the method amax cannot be fused"),
    "norm of a number": (
        lambda g, h: functional.layer_norm(g, (5,)),
        "normalized_shape of layer_norm must be x.shape[-1:]",
    ),
    "norm with a state": (
        lambda g, h: functional.layer_norm(g, g.shape[-1:], h),
        "weight of layer_norm must be a parameter [H]",
    ),
    "norm without eps": (
        lambda g, h: functional.rms_norm(g, g.shape[-1:]),
        "eps of rms_norm must be a number, got None",
    ),
    "shape of a row": (
        lambda g, h: g * g.sum(-1, True).shape[-1],
        "step may read shape[-1] and shape[-1:] of [B,H] only",
    ),
    "root of a number": (
        lambda g, h: g * torch.sqrt(h.shape[-1]),
        "sqrt must have a tensor, got a number",
    ),
    "max": (lambda g, h: g.max(0), "maximum must have two tensors, got 0; use clamp"),
    "max of one": (lambda g, h: torch.min(g), "minimum must have two tensors, got None"),
    "maximum": (lambda g, h: g.maximum(0.0), "maximum must have two tensors, got 0.0"),
    "maximum of torch": (
        lambda g, h: torch.maximum(g, 0.0),
        "(maximum(): argument 'other' (position 2) must be Tensor, not float)",
    ),
    "inplace": (
        lambda g, h: functional.relu(g, inplace=True),
        "step must not change a tensor, got inplace=True for relu",
    ),
    "threshold": (
        lambda g, h: functional.softplus(g, threshold=h),
        "threshold of softplus must be a number, got a tensor",
    ),
    "slope": (
        lambda g, h: functional.leaky_relu(g, h),
        "negative_slope of leaky_relu must be a number, got a tensor",
    ),
    "too large": (lambda g, h: g * 10**400, "got an integer that no float can hold"),
    "power of a tensor": (lambda g, h: g**h, "integer from 1 to 8, got a tensor"),
    "sum along a tensor": (lambda g, h: g.sum(h), "got dim=a tensor and keepdim=False"),
    "power of a number": (lambda g, h: 2**g, "an exponent must be a number, got a tensor"),
    "sigmoid_": (lambda g, h: g.sigmoid_(), "the method sigmoid_ cannot be fused"),
    "linear": (lambda g, h: functional.linear(g, OUTSIDE), "torch's linear cannot be fused"),
    "matmul": (lambda g, h: g @ h, "@ cannot be fused"),
    "branch": (branch, "a branch must not depend on the values of a tensor; use torch.where"),
    "equal": (lambda g, h: torch.where(g == h, g, h), "must be compared with > >= < or <="),
    "loop": (loop, "an iteration over a tensor"),
    "number": (lambda g, h: g * math.exp(h), "a Python number must not depend on the values"),
    "index": (lambda g, h: g[..., 0], "an index into a tensor"),
    "in place": (in_place, "must not change a tensor in place; write a = a + b"),
    "changed": (changed, "an assignment to a part of one"),
    "attribute": (attribute, "an assignment to .data"),
    "shape": (lambda g, h: g * h.shape[0], "step may read shape[-1] and shape[-1:]"),
    "size": (lambda g, h: g * h.size(), "step may read shape[-1] and shape[-1:]"),
    "shape for torch": (lambda g, h: torch.zeros(h.shape), "torch rejects it (zeros(): argument"),
    "type": (lambda g, h: g * h.dtype, "must not read the dtype of a tensor"),
    "tensor": (lambda g, h: g * OUTSIDE, "computed from one, or a number, got a Tensor"),
    "comparison": (lambda g, h: (g > h) * h, "a comparison can be used in torch.where only"),
    "condition": (lambda g, h: torch.where(g, g, h), "the condition of torch.where must be"),
    "infinity": (lambda g, h: g * math.inf, "a constant must be finite, got inf"),
    "exponent": (lambda g, h: g**1.5, "must be 0.5, -0.5 or an integer from 1 to 8, got 1.5"),
    "out": (lambda g, h: torch.tanh(g, out=h), "tanh cannot be fused with these arguments"),
    "zero": (lambda g, h: g / 0, "a divisor must not be 0"),
    "beta": (lambda g, h: functional.softplus(g, beta=2), "beta of softplus must be 1, got 2"),
    "bounds": (lambda g, h: g.clamp(2, 1), "must not be in the wrong order, got 2 and 1"),
    "clamp": (lambda g, h: g.clamp(h, 1), "the bounds of clamp must be numbers"),
    "no bounds": (lambda g, h: g.clamp(), "clamp needs min or max"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_operation_names_its_line(name: str) -> None:
    step, message = WRONG[name]
    first = step.__code__.co_firstlineno
    with pytest.raises(TypeError, match=r"^define_cell: ") as info:
        fastrnn.define_cell(gate(step), gates=1)
    text = str(info.value)
    assert message in text
    found = re.match(rf"define_cell: {re.escape(__file__)}, line (\d+): ", text)
    assert found is not None, text
    assert first <= int(found[1]) <= first + 3
    assert text.endswith(".")
    assert "\n" not in text


def test_error_of_the_function_itself_is_unchanged() -> None:
    with pytest.raises(NameError, match="undefined"):
        fastrnn.define_cell(gate(lambda g, h: undefined(g)), gates=1)  # type: ignore[name-defined]  # noqa: F821


def whole(gates_x: Any, gates_h: Any, h: Any) -> Any:
    return torch.tanh(gates_x[0] + gates_h[0])


ARGUMENTS: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"gates": 0}, ValueError, "gates must be an integer from 1 to 16, got 0"),
    ({"gates": True}, ValueError, "gates must be an integer from 1 to 16, got True"),
    ({"gates": 2}, ValueError, r"gates=2 and neither gates_x\[1\] nor gates_h\[1\] is used"),
    ({"gates": 1, "states": ()}, ValueError, "states must be 1 to 4 names, got 0"),
    ({"gates": 1, "states": "h"}, TypeError, "states must be a tuple of names, got 'h'"),
    ({"gates": 1, "states": ("h", "c")}, TypeError, r"step must take .*gates_x, gates_h, h, c"),
    ({"gates": 1, "parameters": ("w",)}, TypeError, r"step must take .*, h, w=\)"),
    (
        {"gates": 1, "parameters": ("weight_ih",)},
        ValueError,
        "names that are free, got 'weight_ih'",
    ),
    ({"gates": 1, "parameters": ("h",)}, ValueError, "must have different names"),
    ({"gates": 1, "parameters": ("a b",)}, ValueError, "names that are free, got 'a b'"),
    ({"gates": 1, "parameters": {"w": "1"}}, TypeError, "initial value of 'w' .*, got '1'"),
    ({"gates": 1, "name": "a b"}, ValueError, "name must be an identifier, got 'a b'"),
]


@pytest.mark.parametrize(("arguments", "error", "message"), ARGUMENTS)
def test_wrong_argument(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message) as info:
        fastrnn.define_cell(whole, **arguments)
    assert str(info.value).startswith("define_cell: ")


def test_step_must_be_a_function() -> None:
    with pytest.raises(TypeError, match="step must be a function, got int"):
        fastrnn.define_cell(3, gates=1)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("result", "message"),
    [
        (lambda g, h: (g, h), "must return the next h, got 2 value"),
        (lambda g, h: 1.0, "got float for h"),
        (lambda g, h: g > h, "got Symbol for h"),
        (lambda g, h: None, "got NoneType for h"),
    ],
)
def test_wrong_result(result: Callable[[Any, Any], Any], message: str) -> None:
    with pytest.raises(TypeError, match=message) as info:
        fastrnn.define_cell(gate(result), gates=1)
    assert f"{__file__}, line " in str(info.value)


def test_unused_parameter_is_an_error() -> None:
    def step(gates_x: Any, gates_h: Any, h: Any, *, unused: Any) -> Any:
        return gates_x[0] + gates_h[0]

    with pytest.raises(ValueError, match="step must use every parameter, got 'unused'"):
        fastrnn.define_cell(step, gates=1, parameters=("unused",))


def test_profiler_of_the_caller_is_restored() -> None:
    import sys

    def profile(*_: Any) -> None: ...

    sys.setprofile(profile)
    try:
        fastrnn.define_cell(whole, gates=1)
        assert sys.getprofile() is profile
    finally:
        sys.setprofile(None)

"""The one tolerance of this project. No test has a tolerance of its own.

`assert_agrees` allows a result in float32 or a half type, and any other, this error::

    err(result) <= max(2 * err(torch in the same dtype), 2 * err(shaken), floor[dtype])

``err`` is the largest absolute difference from the truth, relative to the largest absolute value of
the truth. The truth is the same computation in float64 from the same (rounded) inputs.

The error of torch depends on the CPU: MKL and oneDNN add in another order on each, and torch may be
exact by luck. So it cannot be the only measure. ``shaken`` is the conditioning of the case, which
is the same on every CPU: the truth again, from inputs that each moved by up to one rounding, with
every product, sum and activation on the way moved by up to one rounding as well (Monte Carlo
arithmetic, D. S. Parker 1997). No kernel that computes in this precision can avoid such roundings.
A case with a sum that cancels, a ReLU at its kink, or many steps in which errors grow moves by more
than a few roundings; a case without is judged as strictly as before.

`assert_same_in_double` compares two ways of one computation in float64 without a truth. It allows
what `torch.testing.assert_close` allows in float64: 1e-7, which is 4e8 roundings. No CPU adds in
such an order, and every wrong term is larger.

Comparisons bit by bit (`torch.equal`) are for results of the same kernel from the same numbers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

# A few roundings on the way through a few gates, whose functions err by up to two units in the last
# place here. It decides where torch is exact by luck, or in float64, where torch is the truth.
FLOOR = {
    dtype: 16 * torch.finfo(dtype).eps
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64)
}

# Most shaken truths for one comparison. They are computed only for a result that neither the error
# of torch nor the floor allows. The largest of 8 random movements is near the largest of many.
SHAKES = 8

Change = Callable[[Tensor], Tensor]  # from a dtype to float64
Exact = Callable[[Change], Any]


def error(value: Tensor, truth: Tensor) -> float:
    """Largest difference relative to the largest value; NaN counts as infinitely wrong."""
    if truth.numel() == 0:
        return 0.0
    scale = truth.abs().max().item() or 1.0
    worst = (value.detach().double() - truth.detach()).abs().max().item() / scale
    return worst if worst == worst else float("inf")


def widen(value: Tensor) -> Tensor:
    """The same numbers in float64."""
    return value.detach().double()


def shake(seed: int, dtype: torch.dtype | None = None) -> Change:
    """A change that widens numbers and moves each by up to one unit in the last place.

    That of ``dtype``, or of the numbers' own.
    """
    generator = torch.Generator().manual_seed(seed)

    def change(value: Tensor) -> Tensor:
        noise = 2 * torch.rand(value.shape, generator=generator, dtype=torch.float64) - 1
        eps = torch.finfo(dtype or value.dtype).eps
        return widen(value) * (1 + eps * noise.to(value.device))

    return change


# what a cell and its derivative are made of
ROUNDED = {
    getattr(torch.ops.aten, name)
    for name in (
        *("mm", "bmm", "addmm", "add", "sub", "rsub", "mul", "sum"),
        *("sigmoid", "tanh", "sigmoid_backward", "tanh_backward"),
    )
}


class Roundings(TorchDispatchMode):
    """Moves the results of arithmetic in float64 by up to one rounding of ``dtype``.

    Half types are rounded at the ends only, which the shaken inputs stand for; in between the
    kernels compute them in float32.
    """

    def __init__(self, seed: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.generator = torch.Generator().manual_seed(seed)
        self.eps = torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).eps

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func.overloadpacket in ROUNDED and result.dtype == torch.float64:
            noise = 2 * torch.rand(result.shape, generator=self.generator, dtype=torch.float64) - 1
            result = result * (1 + self.eps * noise.to(result.device))
        return result


def assert_agrees(ours: Any, theirs: Any, exact: Exact) -> None:
    """Asserts that ``ours`` looks like ``theirs`` and is about as near to the truth.

    Args:
        ours: the tensor that fastrnn computed, or a tree of tensors (tuples, lists, dictionaries).
        theirs: the same from torch, or by another way, in the same dtypes.
        exact: computes the same in float64 from inputs that have all gone through its argument.
            A call with `widen` is the truth.
    """
    got, other, truth = _named(ours), _named(theirs), _named(exact(widen))
    assert got.keys() == other.keys() == truth.keys()
    found, allowed = {}, {}
    for name, value in got.items():
        assert value.shape == other[name].shape == truth[name].shape, (
            f"{name}: {value.shape} != {other[name].shape}"
        )
        assert value.dtype == other[name].dtype, f"{name}: {value.dtype} != {other[name].dtype}"
        if not value.is_floating_point():
            assert torch.equal(value, other[name]), name
            continue
        assert truth[name].dtype == torch.float64, name
        found[name] = error(value, truth[name])
        allowed[name] = max(2 * error(other[name], truth[name]), FLOOR[value.dtype])
    for seed in range(SHAKES):
        if all(found[name] <= allowed[name] for name in found):
            break
        with Roundings(seed, next(iter(got.values())).dtype):
            shaken = _named(exact(shake(seed)))
        for name in found:
            allowed[name] = max(allowed[name], 2 * error(shaken[name], truth[name]))
    for name in found:
        assert allowed[name] < float("inf"), f"{name}: nothing finite to compare with"
        assert found[name] <= allowed[name], (
            f"{name}: error {found[name]:.3g}, allowed {allowed[name]:.3g}"
        )


def assert_is_between(ours: Tensor, fine: Tensor, coarse: Tensor, exact: Exact, name: str) -> None:
    """Asserts that a result in fewer bits (TF32) has these, and no fewer.

    Args:
        ours: the result.
        fine: the same with all bits, whose error is at most an eighth.
        coarse: the same in a half type, whose error, or whose conditioning, allows twice as much.
        exact: as for `assert_agrees`, of this one result.
        name: what to call it in a failure.
    """
    truth = exact(widen)
    found = error(ours, truth)
    assert found > 8 * error(fine, truth), f"{name}: error {found:.3g} is that of all bits"
    shaken = [exact(shake(seed, coarse.dtype)) for seed in range(SHAKES)]
    allowed = max(2 * error(value, truth) for value in (coarse, *shaken))
    assert found <= allowed < float("inf"), f"{name}: error {found:.3g}, allowed {allowed:.3g}"


def assert_same_in_double(got: Any, expected: Any) -> None:
    """Asserts that two ways of one computation in float64 return the same."""
    for leaf in (*_named(got).values(), *_named(expected).values()):
        assert not leaf.dtype.is_floating_point or leaf.dtype == torch.float64, (
            f"{leaf.dtype} needs a truth: assert_agrees"
        )
        assert leaf.dtype != torch.complex64
    torch.testing.assert_close(got, expected)


def _named(tree: Any) -> dict[str, Tensor]:
    """The tensors of a tree by their places in it; of a dictionary, by its keys."""
    if isinstance(tree, Tensor):
        return {"result": tree}
    leaves, _ = pytree.tree_flatten_with_path(tree)
    return {pytree.keystr(path): leaf.detach() for path, leaf in leaves if isinstance(leaf, Tensor)}

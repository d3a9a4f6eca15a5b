"""The one tolerance of this project: a kernel may err twice as much as torch does, or by rounding.

    err(kernel, truth) <= max(2 * err(torch in the same dtype, truth), floor[dtype])

``truth`` is the same computation in float64 from the same (rounded) inputs; err is the largest
absolute difference, relative to the largest absolute value of the truth.

Cases drawn at random may be ill-conditioned: a sum that cancels, a ReLU at its kink. There rounding
the inputs alone moves the truth by more than torch, by luck, errs. Tests that draw their cases give
such `shaken` truths, and err of torch is then the largest of its own and theirs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

# Where torch's own error says nothing: it may hit the exact value by luck, and in float64 the truth
# is itself computed in float64. A few roundings on the way through a few gates, whose functions err
# by up to two units in the last place here; the worst case among the fixed ones is 9 eps.
FLOOR = {
    dtype: 16 * torch.finfo(dtype).eps
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64)
}


def error(value: Tensor, truth: Tensor) -> float:
    """Largest difference relative to the largest value; NaN counts as infinitely wrong."""
    if truth.numel() == 0:
        return 0.0
    scale = truth.abs().max().item() or 1.0
    worst = (value.detach().double() - truth.detach()).abs().max().item() / scale
    return worst if worst == worst else float("inf")


def assert_close(
    ours: Tensor,
    theirs: Tensor,
    truth: Tensor,
    name: str = "result",
    shaken: Sequence[Tensor] = (),
) -> None:
    """Asserts that ``ours`` looks like ``theirs`` and is about as near to the truth.

    Args:
        ours: what fastrnn computed.
        theirs: what torch computed in the same dtype.
        truth: float64 result.
        name: what to call it in a failure.
        shaken: float64 results from inputs that differ by one rounding.
    """
    assert ours.shape == theirs.shape == truth.shape, f"{name}: {ours.shape} != {theirs.shape}"
    assert ours.dtype == theirs.dtype, f"{name}: {ours.dtype} != {theirs.dtype}"
    assert truth.dtype == torch.float64
    allowed = max(*(2 * error(t, truth) for t in (theirs, *shaken)), FLOOR[ours.dtype])
    found = error(ours, truth)
    assert found <= allowed, f"{name}: error {found:.3g}, allowed {allowed:.3g}"


def assert_all_close(
    ours: Mapping[str, Tensor],
    theirs: Mapping[str, Tensor],
    truth: Mapping[str, Tensor],
    shaken: Sequence[Mapping[str, Tensor]] = (),
) -> None:
    """`assert_close` for every entry of dictionaries with the same keys."""
    assert ours.keys() == theirs.keys() == truth.keys()
    for name in ours:
        others = [results[name] for results in shaken]
        assert_close(ours[name], theirs[name], truth[name], name, others)

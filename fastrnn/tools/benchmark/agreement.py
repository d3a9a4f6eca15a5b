"""Whether the libraries compute the same thing. Nothing that differs is timed.

The truth is ``torch.nn`` in float64. A library may err four times as much as ``torch.nn`` itself in
float32, or by some roundings where that is luckily small::

    err(library) <= max(4 * err(torch.nn), 16 * eps)
    err(value)    = max |value - truth| / max |truth|
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

import torch
from torch import Tensor, nn

from .peers import TORCH, ModuleCall
from .shapes import Task

TIMES_TORCH: Final = 4.0
FLOOR: Final = 16 * torch.finfo(torch.float32).eps


class Disagreement(Exception):
    """A library's results are not those of ``torch.nn``; the text is one sentence."""


def error(value: Tensor, truth: Tensor) -> float:
    """Largest difference relative to the largest value; NaN is infinitely wrong."""
    if value.shape != truth.shape:
        return float("inf")
    if truth.numel() == 0:
        return 0.0
    scale = truth.abs().max().item() or 1.0
    worst = (value.double() - truth).abs().max().item() / scale
    return worst if worst == worst else float("inf")


class Referee:
    """Judges the results of one task.

    Args:
        task: what the libraries do; ``torch.nn`` does it here in float64 and in float32.
    """

    def __init__(self, task: Task) -> None:
        self._truth = ModuleCall(nn, task, torch.float64).results()
        torch_results = TORCH.prepare(task).results()
        self._allowed = {
            name: max(TIMES_TORCH * error(torch_results[name], truth), FLOOR)
            for name, truth in self._truth.items()
        }

    def judge(self, title: str, results: Mapping[str, Tensor]) -> float:
        """The largest error of these results.

        Args:
            title: of the library, for the message.
            results: ``output`` and, in training, the gradients.

        Raises:
            Disagreement: a result is missing, or errs by more than it may.
        """
        errors = {
            name: error(results[name], truth) if name in results else float("inf")
            for name, truth in self._truth.items()
        }
        for name, found in errors.items():
            if not found <= self._allowed[name]:
                raise Disagreement(
                    f"{title} differs from torch.nn in float64: {name} by {found:.1e}, "
                    f"where {self._allowed[name]:.1e} is allowed"
                )
        return max(errors.values())

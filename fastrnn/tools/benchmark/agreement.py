"""Check that the libraries agree. A library whose results differ is not timed.

The reference is ``torch.nn`` in float64. The error of a library may be four times that of
``torch.nn`` in float32. The floor of 16 eps covers shapes where the error of ``torch.nn`` happens
to be tiny::

    error(library) <= max(4 * error(torch.nn), 16 * eps)
    error(value)    = max |value - truth| / max |truth|
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

import torch
from torch import Tensor, nn

from .peers import TORCH, ModuleCall
from .shapes import Task

MAX_TORCH_ERRORS: Final = 4.0  # allowed error, in errors of torch.nn in float32
ERROR_FLOOR: Final = 16 * torch.finfo(torch.float32).eps  # relative; always allowed


class Disagreement(Exception):
    """The results of a library differ from those of ``torch.nn``. The message is one line."""


def error(value: Tensor, truth: Tensor) -> float:
    """Returns the largest difference relative to the largest value; infinity for NaN."""
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
        task: the task. The constructor runs it with ``torch.nn`` in float64 and in float32.
    """

    def __init__(self, task: Task) -> None:
        self._truth = ModuleCall(nn, task, torch.float64).results()
        torch_results = TORCH.prepare(task).results()
        self._allowed = {
            name: max(MAX_TORCH_ERRORS * error(torch_results[name], truth), ERROR_FLOOR)
            for name, truth in self._truth.items()
        }

    def judge(self, title: str, results: Mapping[str, Tensor]) -> float:
        """Returns the largest error of the results.

        Args:
            title: name of the library in the error message.
            results: ``output`` and, in training, the gradients.

        Raises:
            Disagreement: a result is missing or its error exceeds the allowed one.
        """
        errors = {
            name: error(results[name], truth) if name in results else float("inf")
            for name, truth in self._truth.items()
        }
        for name, found in errors.items():
            if not found <= self._allowed[name]:
                raise Disagreement(
                    f"{title} differs from torch.nn in float64: {name} by {found:.1e}, "
                    f"allowed: {self._allowed[name]:.1e}"
                )
        return max(errors.values())

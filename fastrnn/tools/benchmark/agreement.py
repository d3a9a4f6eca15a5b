"""Check that the libraries agree. A library whose results differ is not timed.

The reference is ``torch.nn`` in float64, with the same weights and input. The error of a library
may be four times that of ``torch.nn`` in the dtype of the task. The floor covers shapes where the
error of ``torch.nn`` happens to be tiny, and int8, which ``torch.nn`` does not have::

    error(library) <= max(4 * error(torch.nn), floor of the dtype)
    error(value)    = max |value - truth| / max |truth|
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

import torch
from torch import Tensor, nn

from .peers import TORCH, ModuleCall
from .shapes import Task

MAX_TORCH_ERRORS: Final = 4.0  # allowed error, in errors of torch.nn
ERROR_FLOOR: Final = 16 * torch.finfo(torch.float32).eps  # relative; always allowed in float32
#: Relative errors that are always allowed, by dtype. Largest errors in int8, over the shapes of
#: `bench/grid.py` up to H = 650: fastrnn 0.028, ONNX Runtime 0.030, torch 0.060 (docs/int8.md).
ERROR_FLOORS: Final = {
    "float32": ERROR_FLOOR,
    "bfloat16": 4 * torch.finfo(torch.bfloat16).eps,
    "int8": 0.08,
}


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
        task: the task. The constructor runs it with ``torch.nn``, in float64 and as `TORCH` does.
    """

    def __init__(self, task: Task) -> None:
        self._truth = ModuleCall(nn, task, torch.float64).results()
        torch_results = TORCH.prepare(task).results()
        floor = ERROR_FLOORS[task.dtype]
        self._allowed = {
            name: max(MAX_TORCH_ERRORS * error(torch_results[name], truth), floor)
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

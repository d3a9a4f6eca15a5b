"""The arguments of the operators for lengths and resets (csrc/torch/schemas.h), as values."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastrnn.layer_call import PADDED, LayerCall
from fastrnn.ops.fakes import expect_ragged
from fastrnn.ops.segments import Ragged
from fastrnn.spec import CELLS, Weights


class GradientCall(NamedTuple):
    """The arguments of ``ragged_gradients_by_parts``.

    Attributes:
        layer, ragged: those of forward.
        d_outputs: the gradients of y, h_n and c_n.
        y, saved: results of forward.
        needs: whether the gradients of x, h0, c0, reset_h, reset_c and each weight are needed.
    """

    layer: LayerCall
    ragged: Ragged
    d_outputs: tuple[Tensor | None, Tensor | None, Tensor | None]
    y: Tensor
    saved: Tensor
    needs: list[bool]

    @property
    def weight_needs(self) -> list[bool]:
        return self.needs[len(self.needs) - len(self.layer.weights.flat) :]


def ragged_arguments(*args: Any) -> tuple[LayerCall, Ragged]:
    """Checks the arguments from x to ``cell``; the values of the marks only if they are on the CPU.

    Raises:
        RuntimeError: an argument does not fit.
    """
    expect_ragged(*args)
    x, h0, c0, weights, slots, lengths, resets, reset_h, reset_c, cell = args
    if lengths is not None and lengths.is_cpu:
        wrong = lengths[(lengths < 0) | (lengths > len(x))]
        if len(wrong):
            raise RuntimeError(
                f"fastrnn: lengths must be from 0 to the {len(x)} steps of x, got {int(wrong[0])}."
            )
    if resets is not None and resets.is_cpu and resets.dtype != torch.bool:
        is_one = resets == 1
        if not bool((is_one | (resets == 0)).all()):
            raise RuntimeError("fastrnn: resets must hold only 0 and 1, got another value.")
        resets = is_one
    call = LayerCall(CELLS[cell], x, PADDED, h0, c0, Weights(weights, slots))
    return call, Ragged(lengths, resets, reset_h, reset_c)


def gradient_arguments(*args: Any) -> GradientCall:
    """Checks the arguments of ``ragged_gradients_by_parts`` as `ragged_arguments`."""
    d_y, d_h_n, d_c_n, *layer, y, saved, cell, needs = args
    return GradientCall(*ragged_arguments(*layer, cell), (d_y, d_h_n, d_c_n), y, saved, needs)

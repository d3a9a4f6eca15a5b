"""Shapes that exercise different cases of the persistent schedule, and their plans on an H100."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from fastrnn import _C


@dataclass(frozen=True)
class Shape:
    """Sizes T, B, I, H and D of a layer, and the expected values of its plan on an H100."""

    steps: int
    batch: int
    input_size: int
    hidden_size: int
    directions: int
    plan: dict[str, Any]

    def plan_on(self, cell: str, dtype: torch.dtype, training: bool, **chip: Any) -> Any:
        """Returns `_C.cuda_plan` with the persistent schedule requested.

        Args:
            cell: a key of `support.CELLS`.
            dtype: dtype of x and the weights.
            training: plans the backward pass instead of the forward pass.
            chip: further arguments: properties of the GPU, TF32 and the projection size.
        """
        return _C.cuda_plan(
            cell,
            self.steps,
            self.batch,
            self.input_size,
            self.hidden_size,
            dtype=str(dtype).removeprefix("torch."),
            training=training,
            directions=self.directions,
            schedule="persistent",
            **chip,
        )


#               T, B, I, H, D
PERSISTENT_SHAPES = {
    "few rows": Shape(6, 3, 4, 17, 2, {"tensor_cores": False, "units": 8, "row_tiles": 1}),
    "one row tile": Shape(6, 16, 4, 40, 2, {"units": 8, "row_tiles": 1, "row_groups": 1}),
    "groups of one tile": Shape(7, 40, 8, 64, 1, {"units": 8, "row_tiles": 3, "row_groups": 3}),
    "groups of tiles": Shape(5, 40, 16, 768, 1, {"units": 16, "row_tiles": 3, "row_groups": 2}),
    "uneven groups": Shape(5, 100, 8, 300, 1, {"units": 16, "row_tiles": 7, "row_groups": 4}),
    "16 units a block": Shape(5, 20, 8, 600, 2, {"units": 16, "row_tiles": 2, "row_groups": 1}),
}
HIDDEN_SIZES = (1, 17, 129, 768, 1024)

# 35 sequences, many of equal length: three row tiles in the first steps, one in the last steps
MANY_LENGTHS = [11, 1, 7, 7, 3, 9, 2, 2, 5, 11, 8, 4, 4, 4, 6, 1, 10, 3, 3, 7, 5, 5, 9, 2, 6, 1, 8]
MANY_LENGTHS += [3, 4, 10, 2, 7, 1, 6, 5]

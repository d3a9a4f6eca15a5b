"""The shapes of `test_cuda.py` have the intended plans on an H100."""

from __future__ import annotations

import pytest
import torch
from cuda_shapes import HIDDEN_SIZES, MANY_LENGTHS, PERSISTENT_SHAPES, Shape
from support import CELLS

KINDS = [
    (torch.float16, False),
    (torch.bfloat16, False),
    (torch.float32, False),
    (torch.float32, True),
]


@pytest.mark.parametrize("training", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize(("dtype", "tf32"), KINDS, ids=str)
@pytest.mark.parametrize("name", PERSISTENT_SHAPES)
@pytest.mark.parametrize("cell", CELLS)
def test_shape_has_its_intended_plan(
    cell: str, name: str, dtype: torch.dtype, tf32: bool, training: bool
) -> None:
    shape = PERSISTENT_SHAPES[name]
    plan = shape.plan_on(cell, dtype, training, tf32=tf32)
    assert plan["schedule"] == "persistent"
    expected = {
        "tensor_cores": shape.batch > 4 and (tf32 or dtype != torch.float32),
        **shape.plan,
    }
    assert {key: plan[key] for key in expected} == expected


@pytest.mark.parametrize("batch", [3, 20])
@pytest.mark.parametrize("hidden_size", HIDDEN_SIZES)
@pytest.mark.parametrize("cell", CELLS)
def test_hidden_sizes_are_persistent(cell: str, hidden_size: int, batch: int) -> None:
    shape = Shape(4, batch, 8, hidden_size, 1, {})
    for dtype, tf32 in KINDS:
        for training in (False, True):
            plan = shape.plan_on(cell, dtype, training, tf32=tf32)
            assert plan["schedule"] == "persistent"


def test_many_lengths_span_one_to_three_row_tiles() -> None:
    assert len(MANY_LENGTHS) == 35
    assert sum(length > 5 for length in MANY_LENGTHS) <= 16 < len(MANY_LENGTHS)

"""Layers that are linear in time on a GPU, compared with torch's operations on it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tolerance import assert_same_in_double
from torch import Tensor

import fastrnn
from fastrnn import _library
from fastrnn.functional import linear_scan

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.skipif(not _library.cuda_kernels, reason="fastrnn has no CUDA kernels here"),
]


def results(function: Any, *leaves: Tensor) -> list[Tensor]:
    """Returns results and gradients on the CPU."""
    own = [t.detach().clone().requires_grad_() for t in leaves]
    found = function(*own)
    found = found if isinstance(found, tuple) else (found,)
    gradients = torch.autograd.grad(sum(t.square().sum() for t in found), own)
    return [t.detach().cpu() for t in (*found, *gradients)]


# a column per thread, and chunks of steps
@pytest.mark.parametrize("sizes", [(9, 3, 40), (3000, 1, 7)], ids=str)
@pytest.mark.parametrize("reverse", [False, True])
def test_scans(sizes: tuple[int, ...], reverse: bool) -> None:
    a, b = torch.rand(sizes).double(), torch.randn(sizes).double()

    def run(a: Tensor, b: Tensor) -> Tensor:
        return linear_scan(a, b, reverse=reverse)

    assert_same_in_double(results(run, a.cuda(), b.cuda()), results(run, a, b))


@pytest.mark.parametrize("marks", [False, True])
@pytest.mark.parametrize("name", ["MinGRU", "MinLSTM", "SRU"])
def test_layers(name: str, marks: bool) -> None:
    for steps, batch in ((9, 3), (2000, 1)):
        layer = getattr(fastrnn, name)(5, 33, 2, bidirectional=True, dtype=torch.float64)
        x = torch.randn(steps, batch, 5).double()
        options: dict[str, Tensor] = {}
        if marks:
            options["lengths"] = torch.full((batch,), steps - 2)
            options["resets"] = torch.rand(steps, batch) < 0.1
        expected = results(lambda own: layer(own, **options), x)  # noqa: B023
        layer.cuda()
        on_device = {key: value.cuda() for key, value in options.items()}
        got = results(lambda own: layer(own, **on_device), x.cuda())  # noqa: B023
        assert_same_in_double(got, expected)

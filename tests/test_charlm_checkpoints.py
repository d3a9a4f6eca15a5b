"""Odd arguments and files of ``fastrnn charlm sample``."""

from __future__ import annotations

import torch

from fastrnn.charlm.sample import draw


def test_tiny_temperature_takes_the_likeliest() -> None:
    logits = torch.tensor([9.0, 1.0, 3.0, 2.0])  # number 0 is the unknown symbol
    for temperature in (0.0, 5e-324, 1e-320, 1e-46, 1e-38):
        assert draw(logits, temperature, torch.Generator().manual_seed(0)) == 2

"""The constructor option ``forget_bias`` of an LSTM."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

import fastrnn

pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")


def test_forget_bias_is_set_and_the_rest_is_that_of_torch() -> None:
    torch.manual_seed(0)
    theirs = nn.LSTM(3, 4, 2, bidirectional=True).state_dict()
    torch.manual_seed(0)
    layer = fastrnn.LSTM(3, 4, 2, bidirectional=True, forget_bias=1.5)
    for name, parameter in layer.state_dict().items():
        expected = theirs[name].clone()
        if name.startswith("bias"):
            expected[4:8] = 1.5 if "_ih_" in name else 0.0
        assert torch.equal(parameter, expected), name
    nn.init.zeros_(layer.bias_ih_l0)
    layer.reset_parameters()
    assert layer.bias_ih_l0[4:8].eq(1.5).all()
    assert "forget_bias=1.5" in repr(layer)
    assert copy.deepcopy(layer)._forget_bias == 1.5
    assert "forget_bias" not in repr(fastrnn.LSTM(3, 4))
    assert fastrnn.LSTM(3, 4, forget_bias=0).bias_ih_l0[4:8].eq(0).all()


def test_scripted_module_has_the_bias() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lstm = fastrnn.LSTM(3, 4, forget_bias=1.5)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.lstm(x)[0]

    model, x = Model(), torch.randn(5, 2, 3)
    assert torch.equal(torch.jit.script(model)(x), model(x))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), "1", True, [1.0]])
def test_wrong_forget_bias_is_rejected(value: Any) -> None:
    with pytest.raises(ValueError, match="LSTM: forget_bias must be a finite number, got"):
        fastrnn.LSTM(3, 4, forget_bias=value)


def test_forget_bias_needs_an_lstm_with_biases() -> None:
    with pytest.raises(ValueError, match="LSTM: forget_bias needs biases, got bias=False"):
        fastrnn.LSTM(3, 4, bias=False, forget_bias=1.0)
    with pytest.raises(TypeError, match="forget_bias"):
        fastrnn.GRU(3, 4, forget_bias=1.0)

"""The examples in the documentation run."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from torch import nn

import fastrnn

DOCS = Path(__file__).resolve().parent.parent / "docs"
EXAMPLES = re.findall(r"```python\n(.*?)```", (DOCS / "differences.md").read_text(), re.DOTALL)


def test_there_are_examples() -> None:
    assert len(EXAMPLES) >= 3


@pytest.mark.parametrize("code", EXAMPLES)
def test_example(code: str) -> None:
    exec(compile(code, "differences.md", "exec"), {})


def test_loops_by_class() -> None:
    """What the page says of `isinstance`, of the base classes and of `patch`."""
    assert not isinstance(fastrnn.LSTM(3, 4), nn.LSTM)
    assert isinstance(fastrnn.LSTM(3, 4), nn.RNNBase)
    assert isinstance(fastrnn.LSTMCell(3, 4), nn.RNNCellBase)
    with fastrnn.patch():
        assert isinstance(nn.LSTM(3, 4), nn.LSTM)
        assert isinstance(nn.LSTM(3, 4), fastrnn.LSTM)


def test_what_raises_here() -> None:
    x, state = torch.randn(5, 2, 3), torch.zeros(2, 1, 2, 4)
    with pytest.raises(TypeError, match="hx"):
        fastrnn.LSTM(3, 4)(x, state)
    with pytest.raises(RuntimeError, match="hx"):
        fastrnn.RNNCell(3, 4)(torch.zeros(3), torch.zeros(4, 4))
    with pytest.raises(RuntimeError, match="dense"):
        fastrnn.GRU(3, 4)(x.to_sparse())
    assert nn.RNNCell(3, 4)(torch.zeros(3), torch.zeros(4, 4)).shape == (4, 4)

"""The textbook's character model as user code: `fastrnn.RNN` and `nn.RNN` give equal losses."""

from __future__ import annotations

import math
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support import changed
from tolerance import Change, assert_agrees
from torch import Tensor, nn

import fastrnn

README = Path(__file__).resolve().parents[2] / "README.md"
TEXT = (
    "A recurrent network reads a sequence one element at a time and keeps a state: what it has "
    "seen so far. At every step the new state is computed from the input and the old state.\n"
) * 4
STEPS = 40


pytestmark = pytest.mark.usefixtures("one_thread")


class CharRNN(nn.Module):
    """The module of the textbook, with the recurrent layer as an argument."""

    def __init__(
        self,
        recurrent: Callable[..., nn.Module],
        input_size: int,
        hidden_size: int,
        output_size: int,
        num_layers: int,
    ) -> None:
        super().__init__()
        self.embedding = nn.Embedding(input_size, hidden_size)
        self.rnn = recurrent(hidden_size, hidden_size, num_layers, batch_first=True)
        self.decoder = nn.Linear(hidden_size, output_size)

    def forward(self, x: Tensor, h0: Any) -> tuple[Tensor, Any]:
        output, h_n = self.rnn(self.embedding(x), h0)
        return self.decoder(output[:, -1, :]), h_n


def train(
    recurrent: Callable[..., nn.Module],
    num_layers: int,
    dtype: torch.dtype,
    steps: int = STEPS,
    change: Change | None = None,
) -> list[float]:
    """Runs the training loop of the textbook and returns the losses.

    Weights and batches are the same for every ``recurrent``. With a ``change``, training runs in
    float64 from weights rounded to ``dtype`` and changed by it.
    """
    vocabulary = sorted(set(TEXT))
    codes = torch.tensor([vocabulary.index(character) for character in TEXT])
    torch.manual_seed(3)
    # Drawn in float32 for every dtype, so that all dtypes start from the same values.
    model = CharRNN(recurrent, len(vocabulary), 32, len(vocabulary), num_layers).to(dtype)
    if change is not None:
        model, dtype = changed(model, change), torch.float64
    criterion = nn.CrossEntropyLoss()
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    h0 = torch.zeros(num_layers, 16, 32, dtype=dtype)
    state = (h0, h0) if model.rnn.mode == "LSTM" else h0
    losses = []
    for _ in range(steps):
        start = torch.randint(len(codes) - 25, (16,))
        x = torch.stack([codes[i : i + 24] for i in start])
        y = torch.stack([codes[i + 24] for i in start])
        logits, _ = model(x, state)
        loss = criterion(logits, y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("num_layers", [1, 2])
@pytest.mark.parametrize("name", ["RNN", "LSTM", "GRU"])
def test_losses_match_torch(name: str, num_layers: int) -> None:
    ours, theirs = getattr(fastrnn, name), getattr(nn, name)

    def losses(
        recurrent: Callable[..., nn.Module], dtype: torch.dtype, change: Change | None = None
    ) -> dict[str, Tensor]:
        found = train(recurrent, num_layers, dtype, change=change)
        values = torch.tensor(found, dtype=torch.float64 if change else dtype)
        return {f"losses up to step {step}": values[:step] for step in range(1, STEPS + 1)}

    for dtype in (torch.float64, torch.float32):

        def exact(change: Change, dtype: torch.dtype = dtype) -> dict[str, Tensor]:
            return losses(theirs, dtype, change)

        assert_agrees(losses(ours, dtype), losses(theirs, dtype), exact)


def test_patch_replaces_layers_in_unchanged_code() -> None:
    ours = train(fastrnn.RNN, 1, torch.float32)
    made: list[nn.Module] = []

    def book(*args: Any, **options: Any) -> nn.Module:
        made.append(nn.RNN(*args, **options))
        return made[-1]

    with fastrnn.patch():
        patched = train(book, 1, torch.float32)
    train(book, 1, torch.float32, steps=1)
    assert [isinstance(layer, fastrnn.RNN) for layer in made] == [True, False]
    assert patched == ours


def test_readme_example_runs(tmp_path: Path) -> None:
    if not README.exists():
        pytest.skip("needs the README of the source tree")
    blocks = re.findall(
        r"^```python\n(.*?)^```", README.read_text("utf-8"), re.MULTILINE | re.DOTALL
    )
    (code,) = [block for block in blocks if "class CharRNN" in block]
    assert code.count("range(200)") == 1
    assert "fastrnn.RNN(" in code
    program = tmp_path / "program.py"  # the program also trains on its own source
    program.write_text(
        code.replace("range(200)", "range(3)") + "print(step, len(vocabulary), loss.item())\n",
        "utf-8",
    )
    done = subprocess.run(
        [sys.executable, program.name], cwd=tmp_path, capture_output=True, text=True
    )
    assert (done.returncode, done.stderr) == (0, "")
    step, characters, loss = done.stdout.split()
    assert step == "2"
    assert 0 < float(loss) < 2 * math.log(int(characters))  # false for NaN


def test_textbook_model_learns() -> None:
    losses = train(fastrnn.RNN, 1, torch.float32, steps=150)
    assert losses[0] > 0.8 * math.log(len(set(TEXT)))
    assert sum(losses[-10:]) / 10 < 0.6 * losses[0]


def test_textbook_model_with_sigmoid_learns() -> None:
    def sigmoid(*args: Any, **options: Any) -> nn.Module:
        return fastrnn.RNN(*args, nonlinearity="sigmoid", **options)

    losses = train(sigmoid, 1, torch.float32, steps=150)
    assert sum(losses[-10:]) / 10 < 0.9 * losses[0]

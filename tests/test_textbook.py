"""The textbook's code as a user writes it: with `fastrnn.RNN` it trains to `nn.RNN`'s losses."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastrnn


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Small models gain nothing from more, and wait for them where the machine is busy."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


TEXT = (
    "A recurrent network reads a sequence one element at a time and keeps a state: what it has "
    "seen so far. At every step the new state is computed from the input and the old state.\n"
) * 4
STEPS = 40


class CharRNN(nn.Module):
    """The book's module; only the recurrent layer is an argument here."""

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
) -> list[float]:
    """The book's training loop; the same weights and batches for every ``recurrent``."""
    vocabulary = sorted(set(TEXT))
    codes = torch.tensor([vocabulary.index(character) for character in TEXT])
    torch.manual_seed(3)
    # Drawn in float32 for every dtype, so that all start from the same values.
    model = CharRNN(recurrent, len(vocabulary), 32, len(vocabulary), num_layers).to(dtype)
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


def largest_difference(a: list[float], b: list[float]) -> float:
    return max(abs(x - y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("num_layers", [1, 2])
@pytest.mark.parametrize("name", ["RNN", "LSTM", "GRU"])
def test_the_losses_are_those_of_nn(name: str, num_layers: int) -> None:
    ours, theirs = getattr(fastrnn, name), getattr(nn, name)
    truth = train(theirs, num_layers, torch.float64)
    exact = train(ours, num_layers, torch.float64)
    # Rounding, carried through all steps of Adam: far below what any mistake would make.
    assert largest_difference(exact, truth) <= 1e-9
    fast = train(ours, num_layers, torch.float32)
    slow = train(theirs, num_layers, torch.float32)
    floor = 64 * torch.finfo(torch.float32).eps * max(truth)
    for step in range(1, STEPS + 1):
        allowed = max(2 * largest_difference(slow[:step], truth[:step]), floor)
        assert largest_difference(fast[:step], truth[:step]) <= allowed, f"step {step}"


def test_unchanged_code_under_patch() -> None:
    ours = train(fastrnn.RNN, 1, torch.float32)
    with fastrnn.patch():
        patched = train(lambda *args, **options: nn.RNN(*args, **options), 1, torch.float32)
    assert patched == ours


def test_it_learns() -> None:
    losses = train(fastrnn.RNN, 1, torch.float32, steps=150)
    assert losses[0] > 0.8 * math.log(len(set(TEXT)))
    assert sum(losses[-10:]) / 10 < 0.6 * losses[0]


def test_the_sigmoid_of_the_book_trains_too() -> None:
    def sigmoid(*args: Any, **options: Any) -> nn.Module:
        return fastrnn.RNN(*args, nonlinearity="sigmoid", **options)

    losses = train(sigmoid, 1, torch.float32, steps=150)
    assert sum(losses[-10:]) / 10 < 0.9 * losses[0]

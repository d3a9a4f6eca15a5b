"""Speed of the linear recurrence, compared with what users write and with the speed of memory.

    python bench/linear_scan.py [--seconds 0.3] [--threads 2] [--json FILE]

Each figure is a time divided by that of `fastrnn.functional.linear_scan`. "memory limit" is
``torch.add`` of matrices of the same size, which reads two and writes one as the scan does; for
training it is the time of the three matrices of the forward pass and the five of the backward
pass. "loop" computes step by step; "cumulative" is the formula with cumprod and cumsum, which
overflows for long sequences; "associative" is torch's associative scan, compiled (inference, and
only where torch compiles it).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from relative_times import Task, print_times
from torch import Tensor

from fastrnn.functional import linear_scan

Scan = Callable[[Tensor, Tensor], Tensor]

#          T     B    H
SHAPES = [(100, 16, 64), (100, 64, 256), (1000, 16, 256), (1000, 32, 1024), (10000, 1, 64)]
MOST_STEPS_OF_A_LOOP = 1000


def loop(a: Tensor, b: Tensor) -> Tensor:
    """Computes step by step."""
    h = torch.zeros_like(b[0])
    states = []
    for factor, term in zip(a.unbind(), b.unbind(), strict=True):
        h = factor * h + term
        states.append(h)
    return torch.stack(states)


def cumulative(a: Tensor, b: Tensor) -> Tensor:
    """Computes h_t = A_t * sum_s b_s / A_s with A_t = a_1 ... a_t."""
    products = a.cumprod(0)
    return products * (b / products).cumsum(0)


def associative() -> Scan | None:
    """Returns torch's associative scan, compiled, or None if it does not compile here."""
    try:
        from torch._higher_order_ops import associative_scan

        def combine(left: tuple[Tensor, Tensor], right: tuple[Tensor, Tensor]) -> tuple:
            return left[0] * right[0], right[0] * left[1] + right[1]

        def run(a: Tensor, b: Tensor) -> Tensor:
            h: Tensor = associative_scan(combine, (a, b), dim=0, combine_mode="generic")[1]
            return h

        compiled: Scan = torch.compile(run, fullgraph=True)
        compiled(torch.rand(8, 2, 3), torch.rand(8, 2, 3))
    except Exception as error:  # any failure of the compiler: then there is nothing to compare
        print(f"torch's associative scan does not compile: {type(error).__name__}")
        return None
    return compiled


def calls_of(
    steps: int, batch: int, size: int, is_training: bool, scan_of_torch: Scan | None
) -> dict[str, Callable[[], object]]:
    """Returns the calls to compare by their titles, `linear_scan` first."""
    torch.manual_seed(0)
    a = (0.9 + 0.1 * torch.rand(steps, batch, size)).requires_grad_(is_training)
    b = torch.randn(steps, batch, size, requires_grad=is_training)
    gradient = torch.ones(steps, batch, size)

    def timed(run: Scan) -> Callable[[], None]:
        def infer() -> None:
            with torch.no_grad():
                run(a, b)

        def train() -> None:
            torch.autograd.grad(run(a, b), (a, b), gradient)

        return train if is_training else infer

    def memory() -> None:
        with torch.no_grad():
            torch.add(a, b)
            if is_training:
                torch.add(a, b)
                torch.neg(a)

    calls = {"linear_scan": timed(linear_scan), "memory limit": memory}
    if steps <= MOST_STEPS_OF_A_LOOP:
        calls["loop"] = timed(loop)
    calls["cumulative"] = timed(cumulative)
    if scan_of_torch is not None and not is_training:
        calls["associative"] = timed(scan_of_torch)
    return calls


def tasks() -> Iterator[Task]:
    """Yields what is compared."""
    scan_of_torch = associative()
    for mode in ("inference", "training"):
        for steps, batch, size in SHAPES:
            calls = calls_of(steps, batch, size, mode == "training", scan_of_torch)
            yield Task("scan", mode, f"T{steps} B{batch} H{size}", calls)


if __name__ == "__main__":
    print_times(__doc__, tasks(), seconds=0.3)

"""Studies float32 products on the bfloat16 tiles of AMX: their errors, and a bound of their speed.

    python bench/float32_tiles.py [--columns 64]

fastrnn does not compute like this. A float32 factor becomes three bfloat16 parts of 8 bits each,
a = a1 + a2 + a3, and six of the nine products of parts are added in float32:

    a b ~ a1 b1 + (a1 b2 + a2 b1) + (a1 b3 + a2 b2 + a3 b1)

The script computes the pre-activations of an LSTM step, x w_ih^T + h w_hh^T, as the instruction
TDPBF16PS would, and as float32 multiply-adds do, and compares both with float64. It judges them by
the rule of tests/tolerance.py with the error of torch. It needs no CPU with AMX, and measures no
time: the bound of the speed comes from counts of instructions and bytes.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

EPS = torch.finfo(torch.float32).eps
LEAST = torch.finfo(torch.float32).tiny  # the smallest normal number
#: rows (the batch), and units = inputs, of the steps T25 B64 H1024 and T50 B128 H512
SHAPES = ((64, 1024), (128, 512))
TILE_DEPTH = 32
#: terms per sum of fastrnn's float32 kernels
PIECE = 256
#: of torch's error, of the conditioning and of one rounding (tests/tolerance.py)
ALLOWED, FLOOR, SHAKES = 2, 16 * EPS, 3


@dataclass(frozen=True)
class Case:
    """Factors a [B,K] and b [K,N] of a product, float32."""

    name: str
    a: Tensor
    b: Tensor


def factors(batch: int, hidden: int, columns: int) -> tuple[Tensor, Tensor]:
    """Returns x and h as a, and torch's initial w_ih and w_hh of some units as b; I = H."""
    a = torch.cat([torch.randn(batch, hidden), 2 * torch.rand(batch, hidden) - 1], 1)
    b = (2 * torch.rand(2 * hidden, columns) - 1) / math.sqrt(hidden)
    return a, b


def powers(shape: tuple[int, ...], most: int) -> Tensor:
    """Returns random powers of 2 from 2^-most to 2^most."""
    return torch.randint(-most, most + 1, shape).double().exp2()


def cases(batch: int, hidden: int, columns: int) -> Iterator[Case]:
    """Yields ordinary and adversarial factors."""
    a, b = factors(batch, hidden, columns)
    depth = 2 * hidden
    yield Case("ordinary", a, b)
    yield Case("ordinary, all positive", a.abs(), b.abs())
    opposite = b.clone()
    opposite[hidden:] = -b[:hidden] * (1 + 2.0**-12 * torch.randn(hidden, columns))
    yield Case("sums cancel to 2^-12", torch.cat([a[:, :hidden]] * 2, 1), opposite)
    wide = powers((depth,), 40)
    yield Case(
        "factors from 2^-40 to 2^40, products alike",
        (a * wide).float(),
        (b / wide.unsqueeze(1)).float(),
    )
    spread_a, spread_b = powers((batch, depth), 15), powers((depth, columns), 15)
    yield Case("products from 2^-30 to 2^30", (a * spread_a).float(), (b * spread_b).float())
    for exponent in (100, 108, 112, 120, 130):
        scale = 2.0**exponent
        up = 2.0 ** min(exponent, 120)
        yield Case(f"a near 2^-{exponent}", (a.double() / scale).float(), (b.double() * up).float())
    yield Case("results near 2^-125", (a.double() * 2.0**-65).float(), b * 2.0**-60)
    yield Case("results near 2^120", (a.double() * 2.0**60).float(), (b.double() * 2.0**60).float())
    largest = a.clone()
    largest[:, 0] = torch.finfo(torch.float32).max
    small = b.clone()
    small[0] = b[0] * 2.0**-20
    yield Case("a factor is the largest number", largest, small)


def fma(total: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """Returns total + a b, for a [B] and b [N], rounded once to float32 but for rare ties."""
    return torch.addr(total.double(), a.double(), b.double()).float()


def multiply_float32(a: Tensor, b: Tensor) -> Tensor:
    """Returns a b as the float32 kernels compute it."""
    result = torch.zeros(len(a), b.shape[1])
    for begin in range(0, a.shape[1], PIECE):
        total = torch.zeros_like(result)
        for k in range(begin, min(begin + PIECE, a.shape[1])):
            total = fma(total, a[:, k], b[k])
        result = result + total
    return result


def flushed(values: Tensor) -> Tensor:
    """Makes denormal numbers zero."""
    return torch.where(values.abs() < LEAST, values * 0, values)


def parts(values: Tensor) -> list[Tensor]:
    """Returns the three bfloat16 parts as float32. Infinities and NaN are in the first part."""
    found, rest = [], values
    for _ in range(3):
        part = rest.bfloat16().float()
        found.append(flushed(part))
        rest = torch.where(part.isfinite(), rest - part, torch.zeros(()))
    return found


def add_tile(total: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """Returns total + a b for a [B,32] and b [32,N], as TDPBF16PS adds them.

    The first values of pairs are added in one sum, the second ones in another; then both.
    """
    sums = []
    for first in (0, 1):
        own = torch.zeros_like(total)
        for k in range(first, a.shape[1], 2):
            own = flushed(fma(own, a[:, k], b[k]))
        sums.append(own)
    return flushed(flushed(total) + flushed(sums[0] + sums[1]))


def multiply_in_tiles(a: Tensor, b: Tensor, sums: int) -> Tensor:
    """Returns a b by six products of parts.

    Args:
        a, b: the factors; K is a multiple of 32.
        sums: 1: one sum for all products; 2: one more, for all except the largest.
    """
    of_a, of_b = parts(a), parts(b)
    orders = [(2, 0), (1, 1), (0, 2), (1, 0), (0, 1), (0, 0)]  # the smallest products first
    totals = [torch.zeros(len(a), b.shape[1]) for _ in range(sums)]
    for begin in range(0, a.shape[1], TILE_DEPTH):
        own = slice(begin, begin + TILE_DEPTH)
        for i, j in orders:
            which = -1 if (i, j) != (0, 0) else 0
            totals[which] = add_tile(totals[which], of_a[i][:, own], of_b[j][own])
    return totals[0] if sums == 1 else totals[0] + totals[1]


def error(found: Tensor, truth: Tensor) -> float:
    """Largest difference relative to the largest value; NaN counts as infinite."""
    scale = truth.abs().max().item()
    worst = (found.double() - truth).abs().max().item() / scale
    return worst if worst == worst else math.inf


def allowed(case: Case, truth: Tensor) -> float:
    """Returns the largest error that the rule of the tests allows."""

    def moved(values: Tensor) -> Tensor:
        return values.double() * (1 + EPS * (2 * torch.rand(values.shape).double() - 1))

    shaken = max(error(moved(moved(case.a) @ moved(case.b)), truth) for _ in range(SHAKES))
    return max(ALLOWED * error(case.a @ case.b, truth), ALLOWED * shaken, FLOOR)


WAYS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "float32": multiply_float32,
    "one sum": lambda a, b: multiply_in_tiles(a, b, 1),
    "two sums": lambda a, b: multiply_in_tiles(a, b, 2),
}


def print_errors(batch: int, hidden: int, columns: int) -> None:
    """Prints the table of a shape."""
    print(f"\nB = {batch}, K = I + H = {2 * hidden}, {columns} columns")
    print("error relative to the largest result, in units of 2^-23; * breaks the rule")
    print(f"{'factors':46}" + "".join(f"{name:>14}" for name in (*WAYS, "allowed")))
    for case in cases(batch, hidden, columns):
        truth = case.a.double() @ case.b.double()
        limit = allowed(case, truth)
        cells = []
        for multiply in WAYS.values():
            worst = error(multiply(case.a, case.b), truth)
            cells.append(f"{worst / EPS:.3g}" + ("*" if worst > limit else " "))
        cells.append(f"{limit / EPS:.3g} ")
        print(f"{case.name:46}" + "".join(f"{cell:>14}" for cell in cells), flush=True)


def print_not_finite(batch: int, hidden: int, columns: int) -> None:
    """Prints the results of rows that hold an infinity or NaN."""
    a, b = factors(batch, hidden, columns)
    print("\nresults that are infinite, NaN, finite (of all columns of one row)")
    for value, whole in ((math.inf, False), (math.inf, True), (math.nan, False)):
        a[0, 3] = value
        weights = b.bfloat16().float() if whole else b
        name = f"a value is {value}" + (", weights are exact in bfloat16" if whole else "")
        cells = []
        for multiply in WAYS.values():
            row = multiply(a[:1], weights)[0]
            counts = (row.isinf(), row.isnan(), row.isfinite())
            cells.append(", ".join(str(int(count.sum())) for count in counts))
        print(f"{name:46}" + "".join(f"{cell:>14}" for cell in cells))


#: per cycle of one core: float32 multiply-adds; bytes that reach it from L2 and from a slow L3
#: (135 and 25 GB/s at 2.6 GHz, Emerald Rapids)
FMAS, L2_BYTES, L3_BYTES = 32, 52, 9.6
#: cycles of a product of tiles of 16 rows, 16 columns and 32 of K, and of a tile's load
PRODUCT, LOAD = 16, 8


def print_bound() -> None:
    """Prints cycles for 16 columns and 32 of K, and the largest possible ratio."""
    print("\ncycles for 16 columns and 32 of K: float32, six products of tiles, their ratio")
    print(f"{'rows':>6}{'weights in L1':>24}{'in L2':>24}{'in L3':>24}")
    for rows in (16, 32, 64, 128):
        cells = []
        for speed in (math.inf, L2_BYTES, L3_BYTES):
            plain = max(rows * 16 * TILE_DEPTH / FMAS, 16 * TILE_DEPTH * 4 / speed)
            row_tiles = rows // 16
            # two row tiles and two column tiles share their loads: 12 of them for 24 products
            loads = row_tiles * (3 if row_tiles > 1 else 4.5) * LOAD
            products = row_tiles * 6 * PRODUCT
            tiles = max(products, loads, 16 * TILE_DEPTH * 6 / speed)
            cells.append(f"{plain:.0f}, {tiles:.0f}, {plain / tiles:.2f}")
        print(f"{rows:>6}" + "".join(f"{cell:>24}" for cell in cells))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--columns", type=int, default=64, help="columns of the 4 H that are used")
    columns = parser.parse_args().columns
    torch.manual_seed(0)
    for batch, hidden in SHAPES:
        print_errors(batch, hidden, columns)
    print_not_finite(*SHAPES[0], columns)
    print_bound()


if __name__ == "__main__":
    main()

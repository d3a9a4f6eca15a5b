"""Interleaved timing, so that ratios are valid on a busy machine.

Each round runs all libraries in random order. A library's turn starts with a pause, in which the
spinning threads of the previous library go to sleep, and an untimed call. A few timed calls follow.
A temporary slowdown of the machine affects all libraries alike, and medians discard it.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Mapping
from typing import Final

from fastrnn import _C

PAUSE_SECONDS: Final = 0.015  # before each turn
ROUNDS: Final = 12
MIN_ROUNDS: Final = 4  # for calls that take long
MAX_CALLS_PER_ROUND: Final = 50  # timed calls per library and round


def interleaved(
    calls: Mapping[str, Callable[[], object]], seconds: float
) -> dict[str, list[float]]:
    """Times several calls, interleaved.

    Args:
        calls: the calls to time, by name.
        seconds: time to spend per name. A slow call still runs about a dozen times.

    Returns:
        The seconds of every timed call, by name.
    """
    once = {}
    for name, call in calls.items():
        call()
        once[name] = min(_seconds(call) for _ in range(3))
    # Each turn has one untimed call and at least one timed call.
    rounds = min(ROUNDS, max(MIN_ROUNDS, round(1.5 * seconds / max(once.values()))))
    timed = {
        name: min(MAX_CALLS_PER_ROUND, max(1, round(seconds / rounds / first)))
        for name, first in once.items()
    }
    samples: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name in random.sample(list(calls), len(calls)):
            time.sleep(PAUSE_SECONDS)
            calls[name]()
            samples[name] += [_seconds(calls[name]) for _ in range(timed[name])]
    return samples


def _seconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def fma_peak(threads: int) -> float:
    """Returns the peak float32 GFLOP/s of the active instruction set, the best of three tries."""
    return max(_C.fma_peak(threads, 0.02) for _ in range(3))

"""Measuring side by side, so that ratios hold on a machine that is never quiet.

The calls take turns in random order, in rounds. Before its turn there is a pause, in which the
spinning threads of the one before go to sleep, and an untimed call; then a few timed ones. Whatever
slows the machine for a while hits all of them, and medians leave it out.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Mapping
from typing import Final

from fastrnn import _C

PAUSE: Final = 0.015  # seconds
ROUNDS: Final = 12
FEWEST_ROUNDS: Final = 4  # where a single call takes long
MOST_CALLS: Final = 50  # in one turn


def interleaved(
    calls: Mapping[str, Callable[[], object]], seconds: float
) -> dict[str, list[float]]:
    """Times each call in turns.

    Args:
        calls: what to time, by name.
        seconds: to spend on each; a slow call is made a dozen times nevertheless.

    Returns:
        For each name the seconds of every timed call.
    """
    once = {}
    for name, call in calls.items():
        call()
        once[name] = min(_seconds(call) for _ in range(3))
    # An untimed and at least one timed call a turn.
    rounds = min(ROUNDS, max(FEWEST_ROUNDS, round(1.5 * seconds / max(once.values()))))
    timed = {
        name: min(MOST_CALLS, max(1, round(seconds / rounds / first)))
        for name, first in once.items()
    }
    samples: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name in random.sample(list(calls), len(calls)):
            time.sleep(PAUSE)
            calls[name]()
            samples[name] += [_seconds(calls[name]) for _ in range(timed[name])]
    return samples


def _seconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def fma_peak(threads: int) -> float:
    """Float32 GFLOP/s that the instruction set in use can reach here: the best of three tries."""
    return max(_C.fma_peak(threads, 0.02) for _ in range(3))

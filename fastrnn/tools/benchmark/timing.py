"""Interleaved timing, so that ratios are valid on a busy machine.

Each round runs all libraries in random order. A library's turn starts with a pause, which ends when
the spinning threads of the previous library sleep, and an untimed call. A few timed calls follow. A
temporary slowdown of the machine affects all libraries alike, and medians discard it.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Mapping
from typing import Final

from fastrnn import _C

PAUSE_SECONDS: Final = 0.02  # least pause before each turn
#: Longest wait for spinning threads. Measured on two cores of an AMD EPYC: ONNX Runtime's threads
#: spin for 40 to 48 ms after a call, those of torch and fastrnn for 8, OpenVINO's for 2.
LONGEST_WAIT_SECONDS: Final = 0.25
_WINDOW_SECONDS: Final = 0.005  # over which the use of the CPUs is measured
_IDLE_CPUS: Final = 0.2  # a process that uses fewer CPUs has no spinning thread
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
            pause()
            calls[name]()
            samples[name] += [_seconds(calls[name]) for _ in range(timed[name])]
    return samples


def pause() -> None:
    """Sleeps until the threads of this process sleep too, and at least `PAUSE_SECONDS`."""
    time.sleep(PAUSE_SECONDS)
    end = time.perf_counter() + LONGEST_WAIT_SECONDS
    while _cpus_in_use() > _IDLE_CPUS and time.perf_counter() < end:
        pass


def _cpus_in_use() -> float:
    """Returns how many CPUs this process uses while this thread sleeps."""
    wall, cpu = time.perf_counter(), time.process_time()
    time.sleep(_WINDOW_SECONDS)
    return (time.process_time() - cpu) / (time.perf_counter() - wall)


def _seconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def fma_peak(threads: int) -> float:
    """Returns the peak float32 GFLOP/s of the active instruction set, the best of three tries."""
    return max(_C.fma_peak(threads, 0.02) for _ in range(3))

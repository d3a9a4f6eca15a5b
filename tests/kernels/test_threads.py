"""Threads of CPU calls: never more than the usable CPUs, and correct with many callers."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from support import exact_call, run_python
from tolerance import assert_agrees

import fastrnn
from fastrnn import _C

# --- limits of the system ------------------------------------------------------------------------


def control_group(tmp_path: Path, membership: str, files: dict[str, str]) -> int:
    (tmp_path / "cgroup").write_text(membership)
    for name, text in files.items():
        path = tmp_path / "root" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return _C._testing.quota_cpus(str(tmp_path / "cgroup"), str(tmp_path / "root"))


@pytest.mark.parametrize(
    ("membership", "files", "cpus"),
    [
        ("0::/\n", {"cpu.max": "max 100000\n"}, 0),
        ("0::/\n", {"cpu.max": "200000 100000\n"}, 2),
        ("0::/\n", {"cpu.max": "150000 100000\n"}, 2),
        ("0::/\n", {"cpu.max": "1000 100000\n"}, 1),
        ("0::/a/b\n", {"a/b/cpu.max": "max 100000\n", "a/cpu.max": "300000 100000\n"}, 3),
        ("0::/a/b\n", {"a/b/cpu.max": "100000 50000\n", "a/cpu.max": "400000 100000\n"}, 2),
        ("0::/host/path\n", {"cpu.max": "400000 100000\n"}, 4),
        (
            "5:memory:/x\n4:cpu,cpuacct:/x\n",
            {
                "cpu,cpuacct/x/cpu.cfs_quota_us": "250000\n",
                "cpu,cpuacct/x/cpu.cfs_period_us": "100000\n",
            },
            3,
        ),
        ("4:cpu:/\n", {"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, 0),
        ("0::/\n", {}, 0),
        ("nonsense\n", {"cpu.max": "100000 100000\n"}, 0),
        ("", {}, 0),
    ],
)
def test_quota_of_the_control_group_is_read(
    tmp_path: Path, membership: str, files: dict[str, str], cpus: int
) -> None:
    assert control_group(tmp_path, membership, files) == cpus


def test_usable_cpus_follow_the_affinity() -> None:
    before = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, {min(before)})
        assert _C.usable_cpus() == 1
    finally:
        os.sched_setaffinity(0, before)
    assert 1 <= _C.usable_cpus() <= len(before)


BOTH = min(2, _C.usable_cpus())


@pytest.fixture
def two_threads() -> Iterator[None]:
    """Sets torch's number of threads to 2."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def threads_of(call: Callable[[], object]) -> int:
    """Returns the largest number of threads in use at once during a call."""
    _C._testing.peak_threads()
    call()
    return _C._testing.peak_threads()


def train() -> None:
    """Runs forward and backward with enough work for all threads."""
    layer, x = fastrnn.GRU(256, 256), torch.randn(20, 8, 256)
    layer(x)[0].sum().backward()


def test_call_on_one_cpu_uses_one_thread(two_threads: None) -> None:
    # Two threads on one CPU would wait for each other at every barrier.
    before = os.sched_getaffinity(0)
    assert threads_of(train) == BOTH
    try:
        os.sched_setaffinity(0, {min(before)})
        assert threads_of(train) == 1
    finally:
        os.sched_setaffinity(0, before)


def test_torchs_number_of_threads_is_a_limit(two_threads: None) -> None:
    for count in (2, 1):
        torch.set_num_threads(count)
        assert threads_of(train) == min(count, BOTH)


def test_calls_from_many_threads_share_the_cpus(two_threads: None) -> None:
    """Each call has its calling thread. The remaining CPUs are shared between the calls."""
    callers = 6
    start = threading.Barrier(callers)

    def work() -> None:
        start.wait()
        for _ in range(3):
            train()

    def all_at_once() -> None:
        threads = [threading.Thread(target=work) for _ in range(callers)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    assert BOTH <= threads_of(all_at_once) <= callers + _C.usable_cpus() - 1
    assert threads_of(train) == BOTH  # all reservations are released


# --- many callers --------------------------------------------------------------------------------


def gradients(layer: torch.nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
    y, _ = layer(x)
    return [y.detach(), *torch.autograd.grad(y.square().sum(), list(layer.parameters()))]


@pytest.mark.parametrize("batch", [1, 12])
def test_calls_from_many_threads_match_one_caller(batch: int) -> None:
    layers = [fastrnn.LSTM(20, 40, 2, bidirectional=True) for _ in range(6)]
    inputs = [torch.randn(50, batch, 20) for _ in layers]
    expected = [gradients(layer, x) for layer, x in zip(layers, inputs, strict=True)]
    found: list[list[torch.Tensor]] = [[] for _ in layers]
    start = threading.Barrier(len(layers))

    def work(index: int) -> None:
        start.wait()
        for _ in range(5):
            found[index] = gradients(layers[index], inputs[index])

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(layers))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for own, other, layer, x in zip(found, expected, layers, inputs, strict=True):
        assert_agrees(own, other, exact_call(layer, x, call=gradients))


def test_inference_mode_works_in_another_thread() -> None:
    layer, x = fastrnn.GRU(8, 16), torch.randn(30, 2, 8)
    with torch.no_grad():
        expected, _ = layer(x)
    found = []

    def work() -> None:
        with torch.inference_mode():
            found.append(layer(x)[0])

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found[0].is_inference()
    assert_agrees(found[0], expected, exact_call(layer, x, call=lambda layer, x: layer(x)[0]))


def test_omp_num_threads_sets_the_number_of_threads() -> None:
    code = "import torch, fastrnn\nfastrnn.GRU(256, 256)(torch.randn(20, 8, 256))\n"
    code += "print(fastrnn._C._testing.peak_threads())"
    for count in (1, 2):
        assert run_python(code, OMP_NUM_THREADS=str(count)) == str(min(count, BOTH))


# --- fork ----------------------------------------------------------------------------------------

# The child compares with numpy, because large operations of torch would hang in it.
FORK = """
import os, numpy, torch, fastrnn
torch.set_num_threads(2)
torch.manual_seed(0)
layer = fastrnn.{cell}(96, 96, bidirectional={bidirectional}).double()
x = torch.randn(300, {batch}, 96).double()
d_y = torch.randn_like(layer(x)[0])

def work():
    y, _ = layer(x)
    return [y.detach(), *torch.autograd.grad(y, list(layer.parameters()), d_y)]

expected = work()                  # the parent's pool has threads now
children = []
for _ in range(2):
    pid = os.fork()
    if pid == 0:
        # not bitwise: another number of threads may sum in another order
        same = [numpy.allclose(a, b, rtol=1e-7, atol=1e-7) for a, b in zip(work(), expected)]
        os._exit(0 if all(same) else 3)
    children.append(pid)
for pid in children:
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
# the parent continues unaffected
assert torch.allclose(work()[0], expected[0], rtol=1e-7, atol=1e-7)
print("done")
"""


@pytest.mark.parametrize(("cell", "bidirectional"), [("LSTM", False), ("GRU", True)])
@pytest.mark.parametrize("batch", [1, 16])
def test_forked_child_matches_its_parent(cell: str, bidirectional: bool, batch: int) -> None:
    code = FORK.format(cell=cell, bidirectional=bidirectional, batch=batch)
    assert run_python(code) == "done"


def test_sustained_waiting_limits_calls_to_one_thread() -> None:
    # (ms of a call, ms that a rank slept in it) -> ms for which calls then use one thread
    simulate_backoff = _C._testing.simulate_backoff
    assert simulate_backoff([(10, 0), (10, 5)]) == [0, 0]
    assert simulate_backoff([(10, 5), (10, 5)]) == [0, 4]
    assert simulate_backoff([(10, 5), (10, 0), (10, 5)]) == [0, 0, 0]
    assert simulate_backoff([(10, 3), (10, 3)]) == [0, 0]  # less than a third of the call
    assert simulate_backoff([(1, 0.9)] * 25) == [0] * 19 + [4] + [0] * 4 + [8]
    assert simulate_backoff([(10, 5)] * 10) == [0, 4, 8, 16, 32, 64, 128, 256, 512, 512]
    assert simulate_backoff([(4, 3)] * 7) == [0, 0, 0, 0, 4, 0, 8]  # 20 ms, then 5 ms are judged
    assert simulate_backoff([(0.5, 0)] * 36 + [(4, 3.9)]) == [0] * 37  # a single slice is lost
    assert simulate_backoff([(40, 30)] * 3) == [0, 4, 8]
    assert simulate_backoff([(10, 5)] * 4 + [(10, 0), (10, 5)]) == [0, 4, 8, 16, 0, 8]
    assert simulate_backoff([(10, 5), (10, 5), (10, 0), (10, 5), (10, 5)]) == [0, 4, 0, 0, 4]

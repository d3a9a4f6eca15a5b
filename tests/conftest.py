"""Settings for every test: uninitialised memory reads as NaN, and random numbers are fixed."""

from __future__ import annotations

import os
from collections.abc import Iterator

# Threads of libgomp, which torch uses, spin for milliseconds while they wait. Where other processes
# use the CPUs, small operations of torch then take a hundred times as long.
os.environ.setdefault("GOMP_SPINCOUNT", "10000")

import hypothesis
import pytest
import torch

# Also poisons the buffers of the kernels. They read the variable when they acquire the first one.
os.environ["FASTRNN_POISON"] = "1"

hypothesis.settings.register_profile("fastrnn", deadline=None, derandomize=True, print_blob=True)
hypothesis.settings.load_profile("fastrnn")


@pytest.fixture(autouse=True)
def poisoned_memory() -> Iterator[None]:
    """Fills the tensors of ``torch.empty`` with NaN, which reveals unwritten outputs."""
    enabled = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    fill = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(enabled, warn_only=warn_only)
    torch.utils.deterministic.fill_uninitialized_memory = fill


@pytest.fixture(autouse=True)
def fixed_seed() -> None:
    torch.manual_seed(1234)


DEVICES = ["cpu"]
if torch.cuda.is_available():
    DEVICES.append(pytest.param("cuda", marks=pytest.mark.cuda))


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> str:
    """Each device of this machine that has kernels."""
    name: str = request.param
    return name


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Sets one thread. Small models gain nothing from more, and wait for them on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)

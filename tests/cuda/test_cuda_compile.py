"""The check that CUDA kernels do not spill and that the table of their registers is current."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path
from typing import Any

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / ".ci" / "cuda_resources.py"
pytestmark = pytest.mark.skipif(not SCRIPT.exists(), reason="source archives have no .ci")

LOG = """
ptxas info    : Compiling entry function '_ZN7fastrnn4cuda11walk_kernelIfEEvT_' for 'sm_80'
ptxas info    : Function properties for _ZN7fastrnn4cuda11walk_kernelIfEEvT_
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 40 registers, used 1 barriers
ptxas info    : Compiling entry function '_ZN7fastrnn4cuda13upload_kernelIdEEvT_' for 'sm_90a'
ptxas info    : Function properties for _ZN7fastrnn4cuda13upload_kernelIdEEvT_
    16 bytes stack frame, 8 bytes spill stores, 4 bytes spill loads
ptxas info    : Used 255 registers, used 1 barriers
"""


@pytest.fixture(scope="module")
def script() -> dict[str, Any]:
    # dataclasses look up their module in sys.modules
    sys.modules.setdefault("cuda_resources", sys.modules[__name__])
    return runpy.run_path(str(SCRIPT), run_name="cuda_resources")


def test_ptxas_log_is_parsed(script: dict[str, Any]) -> None:
    first, second = script["kernels"](LOG)
    assert (first.name, first.arch, first.registers) == ("float", "sm_80", 40)
    assert first.stack == first.spilled == 0
    assert (second.name, second.arch, second.registers) == ("upload_kernel<double>", "sm_90a", 255)
    assert (second.stack, second.spilled) == (16, 12)


def test_spills_and_stale_tables_are_found(script: dict[str, Any]) -> None:
    found = script["kernels"](LOG)
    good = [script["Kernel"]("AWalk<>", arch, 9, 0, 0) for arch in script["ARCHS"]]
    table = script["text_of"]("13.0.88", good)
    assert script["problems"]("13.0.88", good, table) == []
    assert script["problems"]("13.1.5", good, table) == []
    registers = [script["Kernel"]("AWalk<>", arch, 10, 0, 0) for arch in script["ARCHS"]]
    (stale,) = script["problems"]("13.0.88", registers, table)
    assert "is out of date" in stale
    assert script["problems"]("13.1.5", registers, table) == []
    wrong = "\n".join(script["problems"]("13.1.5", found, table))
    assert "upload_kernel<double> for sm_90a spills 12 bytes and has a stack of 16" in wrong
    assert "no persistent kernel for sm_100" in wrong
    assert "has other kernels" in wrong

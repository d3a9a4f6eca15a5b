"""Scans in chunks of steps, which need more CPUs than a small machine has."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

import fastrnn

SOURCE = Path(__file__).with_name("scan_chunks.cpp")
CSRC = Path(__file__).resolve().parents[2] / "csrc"
LIBRARY = Path(fastrnn.get_library()).resolve()
COMPILER = shlex.split(os.environ.get("CXX", "c++"))
NO_CPUS = 77  # the exit status where a quota of the control group limits the CPUs

pytestmark = [
    pytest.mark.skipif(not CSRC.exists(), reason="needs the source tree"),
    pytest.mark.skipif(shutil.which(COMPILER[0]) is None, reason="needs a C++ compiler"),
]


def test_chunks_agree_with_plain_loops(tmp_path: Path) -> None:
    program = tmp_path / "scan_chunks"
    command = [*COMPILER, "-std=c++17", "-O1", "-pthread", f"-I{CSRC}", str(SOURCE), str(LIBRARY)]
    subprocess.run([*command, "-o", str(program), f"-Wl,-rpath,{LIBRARY.parent}"], check=True)
    result = subprocess.run([str(program)], capture_output=True, text=True, check=False)
    if result.returncode == NO_CPUS:
        pytest.skip("a quota limits the CPUs")
    assert result.returncode == 0, result.stdout + result.stderr

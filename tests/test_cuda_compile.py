"""The GPU's kernels keep everything in registers: nothing on the stack, nothing spilled."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from fastrnn.spec import CELLS

CSRC = Path(__file__).resolve().parents[1] / "csrc"
ARCHS = ("sm_80", "sm_90")

# what `ptxas -v` says of one kernel
KERNEL = re.compile(
    r"Compiling entry function '(?P<name>\w+)' for '(?P<arch>\w+)'.*?"
    r"(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores, "
    r"(?P<loads>\d+) bytes spill loads.*?Used (?P<registers>\d+) registers",
    re.DOTALL,
)


def toolkit() -> tuple[str, list[str]]:
    """nvcc and the folders of its headers; the test is skipped where there is none."""
    home = Path(os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH") or "/usr/local/cuda")
    nvcc = home / "bin" / "nvcc"
    found = str(nvcc) if nvcc.exists() else shutil.which("nvcc")
    folders = [home / "include"]
    if torch.version.cuda is not None:
        wheels = Path(torch.__file__).parents[1] / "nvidia"
        folders.append(wheels / f"cu{torch.version.cuda.split('.')[0]}" / "include")
        folders.append(wheels / "cublas" / "include")
    if found is None or not any((folder / "cublas_v2.h").exists() for folder in folders):
        pytest.skip("needs nvcc and the headers of cuBLAS")
    return found, [str(folder) for folder in folders if folder.is_dir()]


def test_kernels_do_not_spill(tmp_path: Path) -> None:
    nvcc, folders = toolkit()
    source = CSRC / "cuda" / "stepwise.cu"
    command = [nvcc, "-std=c++17", "-O3", "-Xptxas", "-v", "-c", str(source), "-I", str(CSRC)]
    command += ["-o", str(tmp_path / "stepwise.o")]
    for folder in folders:
        command += ["-isystem", folder]
    for arch in ARCHS:
        command.append(f"-gencode=arch={arch.replace('sm', 'compute')},code={arch}")
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert "warning" not in result.stderr

    kernels = [match.groupdict() for match in KERNEL.finditer(result.stderr)]
    for arch in ARCHS:
        # one kernel a cell, dtype and direction of the pass, and a few that only copy or add
        count = sum(kernel["arch"] == arch for kernel in kernels)
        assert count >= 2 * 4 * len(CELLS), result.stderr
    for kernel in kernels:
        assert kernel["stack"] == kernel["stores"] == kernel["loads"] == "0", kernel
        assert int(kernel["registers"]) <= 64, kernel  # two blocks of 512 threads fit

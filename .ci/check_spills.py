"""Fails if a CUDA kernel spills registers, or if there is no kernel for an architecture.

check_spills.py BUILD_LOG ARCH...     the log of a build whose nvcc had -Xptxas -v
"""

from __future__ import annotations

import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

ENTRY = re.compile(r"Compiling entry function '(?P<name>\S+)' for '(?P<arch>\w+)'")
SPILL = re.compile(r"(?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill loads")
USED = re.compile(r"Used (?P<registers>\d+) registers")


@dataclass
class Kernel:
    name: str
    arch: str
    spilled: int = 0  # bytes
    registers: int = 0


def read(log: str) -> list[Kernel]:
    kernels: list[Kernel] = []
    for line in log.splitlines():
        if entry := ENTRY.search(line):
            kernels.append(Kernel(entry["name"], entry["arch"]))
        elif spill := SPILL.search(line):
            if kernels:
                kernels[-1].spilled += int(spill["stores"]) + int(spill["loads"])
        elif (used := USED.search(line)) and kernels:
            kernels[-1].registers = int(used["registers"])
    return kernels


def readable(name: str) -> str:
    try:
        result = subprocess.run(["c++filt", name], capture_output=True, text=True, check=False)
    except OSError:
        return name
    return result.stdout.strip() or name


def main(log: str, archs: list[str]) -> int:
    kernels = read(Path(log).read_text(encoding="utf-8", errors="replace"))
    failed = False
    for arch in archs:
        here = [kernel for kernel in kernels if kernel.arch == arch]
        most = max((kernel.registers for kernel in here), default=0)
        print(f"{arch}: {len(here)} kernels, at most {most} registers")
        failed = failed or not here
    for kernel in kernels:
        if kernel.spilled:
            print(f"{kernel.arch}: {kernel.spilled} bytes spilled by {readable(kernel.name)}")
            failed = True
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], sys.argv[2:]))

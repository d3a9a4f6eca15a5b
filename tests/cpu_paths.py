"""Runs the numerical tests with the code paths that torch uses on other CPUs.

    python tests/cpu_paths.py [pytest arguments]

Rounding errors of torch depend on the CPU. Each path makes torch, MKL and oneDNN select the code of
an older or another CPU. The last one also makes fastrnn emulate AMX. If this
CPU lacks a path, the libraries fall back to their best one. The exit status is 1 if a test fails on
any path. Takes about 2 minutes per path on 2 cores.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

TESTS = [
    "modules/test_modules.py",
    "kernels/test_stack.py",
    "cells/test_textbook.py",
    "package/test_tolerance.py",
]
LONG = "long_sequences or half_types or several_blocks"  # selects tests of test_kernels.py

# the oldest and the newest code paths of each library, with one and two threads
PATHS: list[dict[str, str]] = [
    {
        "ATEN_CPU_CAPABILITY": "default",
        "ONEDNN_MAX_CPU_ISA": "SSE41",
        "MKL_CBWR": "COMPATIBLE",
        "OMP_NUM_THREADS": "1",
    },
    {
        "ATEN_CPU_CAPABILITY": "avx2",
        "ONEDNN_MAX_CPU_ISA": "AVX2",
        "MKL_ENABLE_INSTRUCTIONS": "AVX2",
        "MKL_CBWR": "AVX2",
        "OMP_NUM_THREADS": "2",
    },
    {
        "ATEN_CPU_CAPABILITY": "avx512",
        "ONEDNN_MAX_CPU_ISA": "AVX512_CORE_BF16",
        "MKL_ENABLE_INSTRUCTIONS": "AVX512",
        "FASTRNN_EMULATE_AMX": "1",
        "OMP_NUM_THREADS": "2",
    },
]


def main(arguments: list[str]) -> int:
    here = Path(__file__).resolve().parent
    failed = []
    for path in PATHS:
        title = " ".join(f"{name}={value}" for name, value in path.items())
        print(title, flush=True)
        begin = time.monotonic()
        for command in (
            [*(str(here / name) for name in TESTS)],
            [str(here / "kernels" / "test_kernels.py"), "-k", LONG],
        ):
            done = subprocess.run(
                [sys.executable, "-m", "pytest", "-q", *command, *arguments],
                cwd=here,  # python -m puts this folder on sys.path: fastrnn/ must not lie in it
                env={**os.environ, **path},
                check=False,
            )
            if done.returncode != 0 and title not in failed:
                failed.append(title)
        print(f"{time.monotonic() - begin:.0f} s", flush=True)
    for title in failed:
        print(f"failed: {title}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

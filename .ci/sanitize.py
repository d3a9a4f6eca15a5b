"""Compiles the CPU kernels with a sanitizer and runs tests/kernels/sanitize/driver.cpp on them.

    sanitize.py address     AddressSanitizer and UndefinedBehaviorSanitizer
    sanitize.py thread      ThreadSanitizer

First the driver makes one mistake of each kind on purpose, and the sanitizer must report it. Then
the driver compares every layer with plain loops, and the sanitizer must report nothing. Needs no
torch.

On a CPU with AVX-512, AVX2 is left out, because its kernels are the same templates between the
widest and the narrowest vectors, and a third of the time is spent on each.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from compile import ROOT, SETUP, run_all

SOURCES = ROOT / "tests" / "kernels" / "sanitize"
SECONDS = 1500  # time limit of a run, which takes much less


@dataclass(frozen=True)
class Sanitizer:
    compiler: str
    flags: list[str]
    planted: dict[str, str]  # mistake of the driver -> words of the report


SANITIZERS = {
    "address": Sanitizer(
        "clang++",
        ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"],
        {"overflow": "heap-buffer-overflow", "misaligned": "misaligned address"},
    ),
    # Not clang++, whose ThreadSanitizer ignores accesses of more than 16 bytes (AVX2 and AVX-512).
    "thread": Sanitizer("g++", ["-fsanitize=thread"], {"race": "data race"}),
}


def leaves_out_avx2() -> bool:
    return " avx512f " in Path("/proc/cpuinfo").read_text().replace("\n", " ")


def build(sanitizer: Sanitizer, folder: Path) -> Path:
    """Compiles the kernels and the driver into a folder; returns the program."""
    start = [sanitizer.compiler, *SETUP["CXX_FLAGS"], *SETUP["KERNEL_FLAGS"], "-O1", "-g", "-Icsrc"]
    sources = [*SETUP["files"]("csrc/cpu/**/*.cpp"), str(SOURCES / "driver.cpp")]
    # the largest files first, so that the last ones to end are small
    sources.sort(key=lambda source: "csrc/cpu/isa/" not in source)
    objects = [str(folder / f"{number}.o") for number in range(len(sources))]
    commands = []
    for source, target in zip(sources, objects, strict=True):
        is_left_out = leaves_out_avx2() and source.endswith("isa/avx2.cpp")
        flags = [] if is_left_out else sanitizer.flags
        commands.append([*start, *flags, "-c", source, "-o", target])
    run_all(commands)
    program = folder / "driver"
    run_all([[*start, *sanitizer.flags, *objects, "-o", str(program)]])
    return program


def run(program: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {
        **os.environ,
        "FASTRNN_POISON": "1",  # unwritten memory reads as NaN
        "TSAN_OPTIONS": "halt_on_error=1",
    }
    return subprocess.run(
        [str(program), *arguments],
        env=environment,
        capture_output=True,
        text=True,
        timeout=SECONDS,
        check=False,
    )


def check(name: str, sanitizer: Sanitizer, program: Path) -> bool:
    for mistake, report in sanitizer.planted.items():
        result = run(program, "--plant", mistake)
        if result.returncode == 0 or report not in result.stderr:
            print(f"{result.stderr}\nThe sanitizer '{name}' did not report '{mistake}'.")
            return False
        print(f"{name}: reports '{mistake}'")
    result = run(program, *(["--skip", "avx2"] if leaves_out_avx2() else []))
    print(result.stdout + result.stderr, end="")
    if result.returncode != 0:
        print(f"The sanitizer '{name}' ended the driver with status {result.returncode}.")
    return result.returncode == 0


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("names", nargs="+", choices=list(SANITIZERS), metavar="address|thread")
    for name in parser.parse_args().names:
        sanitizer = SANITIZERS[name]
        with tempfile.TemporaryDirectory() as folder:
            try:
                program = build(sanitizer, Path(folder))
            except subprocess.CalledProcessError:
                return 1
            if not check(name, sanitizer, program):
                return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Registers and shared memory of the CUDA kernels: the table in docs/cuda_kernels.md.

    cuda_resources.py            compiles all of csrc/cuda; fails if a kernel spills or has a stack,
                                 or if the table is out of date (if another nvcc wrote it, only the
                                 names of the kernels are compared)
    cuda_resources.py --log LOG  the same with the log of a build for 8.0, 9.0a and 10.0, whose nvcc
                                 had -Xptxas -v, instead of compiling
    cuda_resources.py --write    writes the table

Needs nvcc, the headers of cuBLAS (a CUDA build of torch includes them) and an installed fastrnn,
whose plan contains the shared memory per block.
"""

from __future__ import annotations

import argparse
import os
import re
import runpy
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
TABLE = ROOT / "docs" / "cuda_kernels.md"
ARCHS = ("sm_80", "sm_90a", "sm_100")
HIDDEN = (256, 512, 768, 1024)

# the output of `ptxas -v` for one kernel
KERNEL = re.compile(
    r"Compiling entry function '(?P<name>\w+)' for '(?P<arch>\w+)'.*?"
    r"(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores, "
    r"(?P<loads>\d+) bytes spill loads.*?Used (?P<registers>\d+) registers",
    re.DOTALL,
)


@dataclass(frozen=True)
class Kernel:
    name: str
    arch: str
    registers: int
    stack: int  # bytes
    spilled: int  # bytes


def kernels(log: str) -> list[Kernel]:
    """Returns the kernels in a log of nvcc, with demangled names."""
    found = [match.groupdict() for match in KERNEL.finditer(log)]
    mangled = "\n".join(kernel["name"] for kernel in found)
    names = subprocess.run(
        ["c++filt"], input=mangled, capture_output=True, text=True, check=True
    ).stdout.splitlines()
    return [
        Kernel(
            short(name),
            kernel["arch"],
            int(kernel["registers"]),
            int(kernel["stack"]),
            int(kernel["stores"]) + int(kernel["loads"]),
        )
        for name, kernel in zip(names, found, strict=True)
    ]


def short(name: str) -> str:
    """Shortens a demangled name, to `ForwardWalk<Lstm, Float16, TensorCores<Float16>, 8>`."""
    name = re.sub(r"fastrnn::(cuda|cells)::|^void |\((unsigned )?int\)", "", name)
    start = end = name.index("<")
    depth = 0
    for end in range(start, len(name)):
        depth += {"<": 1, ">": -1}.get(name[end], 0)
        if depth == 0:
            break
    kernel, inner = name[:start], re.sub(r"\s+>", ">", name[start + 1 : end]).strip()
    return inner if kernel in ("walk_kernel", "for_each_kernel") else f"{kernel}<{inner}>"


def version_of(nvcc: str) -> str:
    release = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True)
    return re.findall(r"release ([\d.]+), V([\d.]+)", release.stdout)[0][1]


def compile_all(setup: dict[str, Any], nvcc: str) -> str:
    """Returns the log of nvcc for all sources and architectures."""
    cuda = setup["find_cuda"](setup["find_torch"]())
    if cuda is None:
        raise SystemExit("needs nvcc and a torch with CUDA")
    with tempfile.TemporaryDirectory() as folder:

        def compile_one(job: tuple[Path, str]) -> str:
            source, arch = job
            command = [nvcc, *setup["NVCC_FLAGS"], "-Xptxas", "-v", "-I", str(ROOT / "csrc")]
            for include in cuda.include:
                command += ["-isystem", include]
            command.append(f"-gencode=arch={arch.replace('sm', 'compute')},code={arch}")
            command += [
                "-c",
                str(source),
                "-o",
                f"{folder}/{source.parent.name}-{source.stem}-{arch}.o",
            ]
            result = subprocess.run(command, capture_output=True, text=True, check=False)
            if result.returncode != 0 or "warning" in result.stderr:
                raise SystemExit(f"{source.name} for {arch}:\n{result.stderr}")
            return result.stderr

        sources = sorted(ROOT.glob("csrc/cuda/**/*.cu"))
        jobs = [(source, arch) for source in sources for arch in ARCHS]
        with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
            return "".join(pool.map(compile_one, jobs))


def registers_table(found: list[Kernel]) -> list[str]:
    by_name: dict[str, dict[str, int]] = {}
    for kernel in found:
        by_name.setdefault(kernel.name, {})[kernel.arch] = kernel.registers
    lines = [f"| kernel | {' | '.join(ARCHS)} |", "|---|" + "--:|" * len(ARCHS)]
    for name in sorted(by_name):
        counts = " | ".join(str(by_name[name].get(arch, "-")) for arch in ARCHS)
        lines.append(f"| `{name}` | {counts} |")
    return lines


def shared_table() -> list[str]:
    from fastrnn import _C

    lines = [
        f"| pass | cell | dtype | {' | '.join(f'H={hidden}' for hidden in HIDDEN)} |",
        "|---|---|---|" + "--:|" * len(HIDDEN),
    ]
    for training in (False, True):
        for cell in ("rnn_tanh", "gru", "lstm"):
            for dtype in ("float16", "float32"):
                row = []
                for hidden in HIDDEN:
                    plan = _C.cuda_plan(
                        cell, 100, 16, 1, hidden, dtype=dtype, training=training, schedule="auto"
                    )
                    if plan["schedule"] == "persistent":
                        kib = plan["shared_bytes"] / 1024
                        row.append(f"{plan['unit_blocks']} x {kib:.1f}")
                    else:
                        row.append(plan["schedule"])
                way = "backward" if training else "forward"
                lines.append(f"| {way} | {cell} | {dtype} | {' | '.join(row)} |")
    return lines


def text_of(version: str, found: list[Kernel]) -> str:
    walks = [kernel for kernel in found if "Walk<" in kernel.name]
    rest = [kernel for kernel in found if "Walk<" not in kernel.name]
    return "\n".join(
        [
            "# Registers and shared memory of the CUDA kernels",
            "",
            f"Written by `.ci/cuda_resources.py --write` with nvcc {version}. No kernel spills or",
            "has a stack. A persistent kernel's name ends with the hidden units per block.",
            "",
            "## Persistent: shared memory",
            "",
            "Blocks per direction x KiB of shared memory per block, on an H100 (132",
            "multiprocessors, 227 KiB per block) with a batch of 16. A multiprocessor runs one",
            "block of 256 threads.",
            "bfloat16 needs the same as float16, TF32 the same as float32.",
            "",
            *shared_table(),
            "",
            "## Persistent: registers per thread",
            "",
            "At most 255 are possible with 256 threads per block.",
            "",
            *registers_table(walks),
            "",
            "## Stepwise and preparations: registers per thread",
            "",
            *registers_table(rest),
            "",
        ]
    )


def problems(version: str, found: list[Kernel], table: str) -> list[str]:
    """Returns a message for each problem."""
    result = [
        f"{kernel.name} for {kernel.arch} spills {kernel.spilled} bytes and has a stack of "
        f"{kernel.stack}"
        for kernel in found
        if kernel.spilled or kernel.stack
    ]
    for arch in ARCHS:
        if not any(kernel.arch == arch and "Walk<" in kernel.name for kernel in found):
            result.append(f"there is no persistent kernel for {arch}")
    advice = "run .ci/cuda_resources.py --write"
    if f"with nvcc {version}." in table:
        if table != text_of(version, found):
            result.append(f"{TABLE.name} is out of date: {advice}")
    else:
        here, there = {kernel.name for kernel in found}, set(re.findall(r"\| `(.+?)` \|", table))
        if here != there:
            result.append(f"{TABLE.name} has other kernels: {sorted(here ^ there)}: {advice}")
    return result


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true", help="write the table")
    parser.add_argument("--log", type=Path, help="the log of a build, instead of compiling")
    arguments = parser.parse_args()
    setup = runpy.run_path(str(ROOT / "setup.py"), run_name="setup_under_ci")
    nvcc = setup["find_nvcc"]()
    if nvcc is None:
        raise SystemExit("needs nvcc")
    version = version_of(nvcc)
    if arguments.log is None:
        log = compile_all(setup, nvcc)
    else:
        log = arguments.log.read_text(encoding="utf-8", errors="replace")
    found = kernels(log)
    if arguments.write:
        TABLE.write_text(text_of(version, found), encoding="utf-8")
    wrong = problems(version, found, TABLE.read_text(encoding="utf-8"))
    for arch in ARCHS:
        here = [kernel for kernel in found if kernel.arch == arch]
        most = max((kernel.registers for kernel in here), default=0)
        print(f"{arch}: {len(here)} kernels, at most {most} registers")
    print("\n".join(wrong))
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())

"""Compiles parts of csrc/ with the flags of setup.py, for another CPU or against another torch.

    compile.py kernels --compiler aarch64-linux-gnu-g++ --out FOLDER [--link]
    compile.py torch --torch SITE_PACKAGES/torch --out FOLDER
    compile.py database [--out FOLDER]

Compiles to objects (with --link, also to the kernels' shared library). Warnings are errors.
`database` compiles nothing: it writes compile_commands.json, which tells clangd and clang-tidy the
flags of every source and header in csrc/ and tests/ (CUDA sources only if there are nvcc and a CUDA
build of torch).
"""

from __future__ import annotations

import argparse
import json
import os
import runpy
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SETUP = runpy.run_path(str(ROOT / "setup.py"), run_name="setup_under_ci")
INCLUDE = [f"-I{folder}" for folder in SETUP["INCLUDE"]]


def kernels() -> dict[str, list[str]]:
    """Source -> flags"""
    flags = [*SETUP["CXX_FLAGS"], *SETUP["KERNEL_FLAGS"]]
    return dict.fromkeys(SETUP["files"](*SETUP["KERNEL_SOURCES"]), flags)


def torch_sources(folder: Path) -> dict[str, list[str]]:
    flags = [
        *SETUP["CXX_FLAGS"],
        f"-DTORCH_TARGET_VERSION={SETUP['TORCH_TARGET_VERSION']}",
        *SETUP["system_include"](str(folder / "include")),
    ]
    cuda = SETUP["find_cuda"](SETUP["find_torch"]())
    result = {}
    for source in SETUP["files"]("csrc/torch/*.cpp"):
        result[source] = flags
        if source.endswith("_cuda.cpp"):
            assert cuda is not None, "the environment's torch must be one with CUDA"
            result[source] = [*flags, "-DUSE_CUDA=1", *SETUP["system_include"](*cuda.include)]
    return result


def database() -> list[dict[str, str | list[str]]]:
    """Returns the entries of compile_commands.json."""
    torch = SETUP["find_torch"]()
    cuda = SETUP["find_cuda"](torch)
    flags: dict[str, list[str]] = {}
    for library in SETUP["libraries"](SETUP["project_version"](), torch, cuda):
        compile_args = library.extra_compile_args
        cxx = compile_args["cxx"] if isinstance(compile_args, dict) else compile_args
        macros = [f"-D{name}={value}" for name, value in library.define_macros]
        if library.name == "fastrnn._C":  # setuptools adds it when it compiles
            macros.append(f"-I{sysconfig.get_paths()['include']}")
        for source in library.sources:
            own = cxx
            if source.endswith(".cu"):  # for clang, which takes no flag of nvcc
                own = [*cxx, "-xcuda", "--cuda-host-only", "-nocudalib"]
            flags[source] = [*own, *macros]
    # A header alone has the flags of the sources around it, as C++.
    of_kernels, of_torch = flags["csrc/cpu/call.cpp"], flags["csrc/torch/ops.cpp"]
    for header in SETUP["files"]("csrc/**/*.h"):
        own = of_torch if header.startswith("csrc/torch/") else of_kernels
        flags[header] = [*own, "-xc++-header"]
    for source in SETUP["files"]("tests/**/*.cpp"):
        flags[source] = [*of_kernels, *[f for f in of_torch if f not in of_kernels]]
    return [
        {
            "directory": str(ROOT),
            "file": source,
            "arguments": ["clang++", *INCLUDE, *own, "-c", source],
        }
        for source, own in sorted(flags.items())
    ]


def run(command: list[str]) -> None:
    print(command[0], "->", command[-1], flush=True)
    subprocess.run(command, cwd=ROOT, check=True)


def run_all(commands: list[list[str]]) -> None:
    """Runs MAX_JOBS (default 2) commands at a time; raises CalledProcessError if one fails."""
    with ThreadPoolExecutor(int(os.environ.get("MAX_JOBS", "2"))) as pool:
        list(pool.map(run, commands))


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("what", choices=["kernels", "torch", "database"])
    parser.add_argument("--compiler", default="g++")
    parser.add_argument("--torch", type=Path)
    parser.add_argument("--out", type=Path, default=ROOT)
    parser.add_argument("--link", action="store_true")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    if options.what == "database":
        path = options.out / "compile_commands.json"
        path.write_text(json.dumps(database(), indent=1) + "\n")
        print(f"wrote {path}")
        return 0
    if options.out == ROOT:
        parser.error("--out must name a folder for the objects")

    sources = kernels() if options.what == "kernels" else torch_sources(options.torch.resolve())
    objects = [str(options.out / Path(source).with_suffix(".o").name) for source in sources]
    start = [options.compiler, "-Werror", "-fPIC", "-DNDEBUG", *INCLUDE]
    commands = [
        [*start, *flags, "-c", source, "-o", target]
        for (source, flags), target in zip(sources.items(), objects, strict=True)
    ]
    try:
        run_all(commands)
        if options.link:
            library = str(options.out / "libfastrnn_kernels.so")
            link = [*SETUP["LINK_FLAGS"], SETUP["NO_UNDEFINED"]]
            run([options.compiler, "-shared", *link, *objects, "-o", library])
    except subprocess.CalledProcessError:
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Compiles parts of csrc/ as setup.py would, for another machine or against another torch.

    compile.py kernels --compiler aarch64-linux-gnu-g++ --out FOLDER [--link]
    compile.py torch --torch SITE_PACKAGES/torch --out FOLDER

Objects only (with --link, the kernels' shared library too); a warning is an error.
"""

from __future__ import annotations

import argparse
import os
import runpy
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SETUP = runpy.run_path(str(ROOT / "setup.py"), run_name="setup_under_ci")


def kernels() -> dict[str, list[str]]:
    """Source -> flags"""
    flags = [*SETUP["CXX_FLAGS"], *SETUP["KERNEL_FLAGS"]]
    return dict.fromkeys(SETUP["files"]("csrc/cpu/**/*.cpp"), flags)


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
        if source.endswith("ops_cuda.cpp"):
            assert cuda is not None, "the environment's torch must be one with CUDA"
            result[source] = [*flags, "-DUSE_CUDA=1", *SETUP["system_include"](*cuda.include)]
    return result


def run(command: list[str]) -> None:
    print(command[0], "->", command[-1], flush=True)
    subprocess.run(command, cwd=ROOT, check=True)


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("what", choices=["kernels", "torch"])
    parser.add_argument("--compiler", default="g++")
    parser.add_argument("--torch", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--link", action="store_true")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)

    sources = kernels() if options.what == "kernels" else torch_sources(options.torch.resolve())
    objects = [str(options.out / Path(source).with_suffix(".o").name) for source in sources]
    start = [options.compiler, "-Werror", "-fPIC", "-DNDEBUG", "-Icsrc"]
    commands = [
        [*start, *flags, "-c", source, "-o", target]
        for (source, flags), target in zip(sources.items(), objects, strict=True)
    ]
    try:
        with ThreadPoolExecutor(int(os.environ.get("MAX_JOBS", "2"))) as pool:
            list(pool.map(run, commands))
        if options.link:
            library = str(options.out / "libfastrnn_kernels.so")
            link = [*SETUP["LINK_FLAGS"], SETUP["NO_UNDEFINED"]]
            run([options.compiler, "-shared", *link, *objects, "-o", library])
    except subprocess.CalledProcessError:
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())

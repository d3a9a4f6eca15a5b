"""Builds the native libraries of fastrnn. pyproject.toml holds all static metadata.

    csrc/cpu/**/*.cpp, csrc/c/*.cpp fastrnn/lib/libfastrnn_kernels.so     no torch, no Python
    csrc/bindings/*.cpp             fastrnn/_C.<python abi>.so            pybind11, links kernels
    csrc/torch/*.cpp                fastrnn/lib/libfastrnn_torch.so       stable ABI, links kernels
    csrc/cuda/**/*.cu, ops*_cuda.cpp fastrnn/lib/libfastrnn_torch_cuda.so only with CUDA

torch/arguments.cpp is compiled into both libraries that use torch.

Environment variables:
    FASTRNN_CUDA          unset: builds CUDA if there are nvcc and a CUDA build of torch; 1: fails
                          without them; 0: does not build CUDA
    TORCH_CUDA_ARCH_LIST  GPU architectures, default "8.0;9.0+PTX"
    CXX, CXXFLAGS         the C++ compiler, and flags that are added after fastrnn's own
    CUDA_HOME             the CUDA toolkit; default: the toolkit of the nvcc on PATH
    NVCC_APPEND_FLAGS     read by nvcc itself
    MAX_JOBS              number of files that ninja compiles at the same time
"""

from __future__ import annotations

import glob
import hashlib
import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from setuptools import Extension, setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
OLDEST_TORCH = (2, 11)
TORCH_TARGET_VERSION = "0x020b000000000000"  # the stable ABI of torch 2.11
DEFAULT_CUDA_ARCHS = "8.0;9.0+PTX"

CXX_FLAGS = ["-std=c++17", "-O3", "-g0", "-fvisibility=hidden", "-Wall", "-Wextra", "-pthread"]
# In the kernels, a*b+c may be contracted into one rounding, and errno and floating-point traps are
# not needed. NaN, infinities and the order of sums keep their meaning. No -march: each instruction
# set is selected by a pragma in its own source file, so that one binary runs on every CPU.
KERNEL_FLAGS = ["-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math"]
# Float divisions may have an error of 2 ulp instead of 0.5 ulp: correctly rounded division calls a
# function, for one gate of a cell after another.
NVCC_FLAGS = ["-std=c++17", "-O3", "-prec-div=false"]
NVCC_FLAGS += ["-Xcompiler=-fvisibility=hidden,-Wall,-Wextra,-g0"]
KERNEL_SOURCES = ("csrc/cpu/**/*.cpp", "csrc/c/*.cpp")
# Folders of csrc/ whose headers the package has, in fastrnn/include/csrc, for fastrnn.define_cell.
KERNEL_HEADERS = ("cells", "cpu", "problem")
# Folders of csrc/'s headers and of the header of the C interface.
INCLUDE = ("csrc", "fastrnn/include")
# All symbols are resolved at load time, so an incompatible library fails there, not in a call.
LINK_FLAGS = ["-pthread", "-Wl,-z,now"]
NO_UNDEFINED = "-Wl,--no-undefined"


def build_error(reason: str) -> SystemExit:
    """Returns the exception that ends the build with a one-line message and no traceback."""
    return SystemExit(f"fastrnn cannot be built: {reason}")


@dataclass(frozen=True)
class Torch:
    """The torch that the build compiles against."""

    version: str
    cuda: str | None  # e.g. "13.0"
    include: str
    lib: str


@dataclass(frozen=True)
class Cuda:
    """A CUDA toolkit of the same major version as torch's."""

    version: str
    arch_flags: list[str]
    include: list[str]


def numbers(version: str) -> tuple[int, ...]:
    return tuple(int(n) for n in re.findall(r"\d+", version)[:2])


def find_torch() -> Torch:
    try:
        import torch
    except ImportError as error:
        raise build_error(
            f"torch >= 2.11 is not installed for {sys.executable} ({error}); install it first, "
            "or build without --no-build-isolation."
        ) from None
    if numbers(torch.__version__) < OLDEST_TORCH:
        raise build_error(f"torch must be 2.11 or newer, got {torch.__version__}.")
    root = Path(torch.__file__).parent
    version = str(torch.__version__)
    return Torch(version, torch.version.cuda, str(root / "include"), str(root / "lib"))


def check_tools() -> None:
    """Raises if the compiler, pybind11 or ninja is missing."""
    if not sys.platform.startswith("linux"):
        raise build_error(f"the operating system must be Linux, got {sys.platform}.")
    compiler = shlex.split(os.environ.get("CXX", "c++"))[0]
    if shutil.which(compiler) is None:
        raise build_error(
            f"the C++ compiler {compiler!r} is missing; install g++ or clang, or set CXX to "
            "another compiler."
        )
    if importlib.util.find_spec("pybind11") is None:
        raise build_error(
            "pybind11 is not installed; install it, or build without --no-build-isolation."
        )
    if shutil.which("ninja") is None:
        if importlib.util.find_spec("ninja") is None:
            raise build_error(
                "ninja is not installed; install it, or build without --no-build-isolation."
            )
        import ninja  # installed as a package, but not on PATH

        os.environ["PATH"] = os.pathsep.join([ninja.BIN_DIR, os.environ.get("PATH", "")])


def find_nvcc() -> str | None:
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH")]
    candidates = [os.path.join(home, "bin", "nvcc") for home in homes if home]
    candidates += [shutil.which("nvcc") or "", "/usr/local/cuda/bin/nvcc"]
    return next((path for path in candidates if os.access(path, os.X_OK)), None)


def output_of(command: list[str]) -> str:
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    return result.stdout + result.stderr


def find_cuda(torch: Torch) -> Cuda | None:
    """Returns the CUDA toolkit to build with, or None; depends on FASTRNN_CUDA."""
    requested = os.environ.get("FASTRNN_CUDA", "")
    if requested not in ("", "0", "1"):
        raise build_error(f"FASTRNN_CUDA must be 0 or 1, got {requested!r}.")
    if requested == "0":
        print("fastrnn: building without CUDA (FASTRNN_CUDA=0).")
        return None
    cuda, missing = find_compatible_cuda(torch)
    if missing:
        if requested == "1":
            raise build_error(f"FASTRNN_CUDA=1 requires the CUDA kernels, but {missing}.")
        print(f"fastrnn: building without CUDA: {missing}.")
    return cuda


def find_compatible_cuda(torch: Torch) -> tuple[Cuda | None, str]:
    """Returns (toolkit, "") or (None, the reason why there is none)."""
    if torch.cuda is None:
        return None, f"torch {torch.version} is a build without CUDA"
    nvcc = find_nvcc()
    if nvcc is None:
        return None, "nvcc is not in CUDA_HOME, on PATH or in /usr/local/cuda"
    match = re.search(r"release (\d+\.\d+)", output_of([nvcc, "--version"]))
    if match is None:
        return None, f"{nvcc} --version does not print a version"
    version = match.group(1)
    if numbers(version)[0] != numbers(torch.cuda)[0]:
        return None, f"{nvcc} is CUDA {version} and torch was built for CUDA {torch.cuda}"

    # nvcc may be a wrapper or come from conda or Debian, so ask its dry run where its headers are.
    dry_run = output_of([nvcc, "--dryrun", "-x", "cu", "-c", os.devnull, "-o", os.devnull])
    top = re.search(r"^#\$ TOP=(.+)$", dry_run, re.MULTILINE)
    include = [
        os.path.normpath(path)
        for line in re.findall(r"^#\$ INCLUDES=(.+)$", dry_run, re.MULTILINE)
        for path in re.findall(r'-I([^"\s]+)', line)
    ]
    home = os.path.normpath(top.group(1)) if top else os.path.dirname(os.path.dirname(nvcc))
    include = include or [os.path.join(home, "include")]
    # The CUDA wheels that torch depends on have the headers that a minimal toolkit lacks.
    wheels = Path(torch.include).parents[1] / "nvidia"
    major = numbers(version)[0]
    include += [str(wheels / f"cu{major}" / "include"), str(wheels / "cublas" / "include")]
    # An explicit -isystem /usr/include would break include_next in the compiler's own headers.
    include = [path for path in include if os.path.isdir(path) and path != "/usr/include"]
    searched = [*include, "/usr/include"]
    for header in ("cuda_runtime.h", "cublas_v2.h"):
        if not any(os.path.exists(os.path.join(path, header)) for path in searched):
            where = f"the CUDA toolkit {home} nor in torch's CUDA wheels"
            return None, f"{header} is neither in {where}"

    os.environ["CUDA_HOME"] = home  # cpp_extension calls the nvcc in this folder
    os.environ.setdefault("TORCH_CUDA_ARCH_LIST", DEFAULT_CUDA_ARCHS)
    from torch.utils import cpp_extension

    try:
        arch_flags = cpp_extension._get_cuda_arch_flags()
    except ValueError as error:
        archs = os.environ["TORCH_CUDA_ARCH_LIST"]
        raise build_error(f"TORCH_CUDA_ARCH_LIST={archs!r} is invalid ({error}).") from None
    return Cuda(version, list(arch_flags), include), ""


def project_version() -> str:
    """Returns the version in pyproject.toml. (Python 3.10 has no tomllib.)"""
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    match = re.search(r'^version = "([^"]+)"$', text, re.MULTILINE)
    assert match is not None
    return match.group(1)


def arch_names(flags: list[str]) -> list[str]:
    """Returns ["sm_90", ...] for ["-gencode=arch=compute_90,code=sm_90", ...]."""
    return [flag.rpartition("code=")[2] for flag in flags]


def files(*patterns: str) -> list[str]:
    found = (
        path for pattern in patterns for path in glob.glob(pattern, root_dir=ROOT, recursive=True)
    )
    return sorted(set(found))


def system_include(*paths: str) -> list[str]:
    """Returns flags that include headers of other projects as system headers, without warnings."""
    return [word for path in paths for word in ("-isystem", path)]


def text_macro(name: str, value: str) -> tuple[str, str]:
    return name, f'"{value}"'


def kernel_headers(folder: Path) -> list[Path]:
    """Returns the headers that the kernels of a cell are compiled from, relative to csrc/."""
    found = (path for part in KERNEL_HEADERS for path in (folder / part).rglob("*.h"))
    return sorted(path.relative_to(folder) for path in found)


def hash_of_headers(folder: Path) -> str:
    """Returns a hash of the kernels' headers. `fastrnn/define/library.py` computes the same."""
    digest = hashlib.sha256()
    for path in kernel_headers(folder):
        digest.update(f"{path.as_posix()}\n".encode())
        digest.update((folder / path).read_bytes())
    return digest.hexdigest()[:16]


def libraries(version: str, torch: Torch, cuda: Cuda | None) -> list[Extension]:
    """Returns the libraries in the order in which they have to be linked."""
    import pybind11

    user_flags = shlex.split(os.environ.get("CXXFLAGS", ""))
    headers = files("csrc/**/*.h", "csrc/**/*.cuh", "fastrnn/include/*.h")
    common: dict[str, Any] = {
        "language": "c++",
        "include_dirs": [str(ROOT / folder) for folder in INCLUDE],
        "depends": headers,
    }
    torch_macros = [
        ("TORCH_TARGET_VERSION", TORCH_TARGET_VERSION),
        # Puts torch's version on the command line, so that another torch causes a rebuild.
        text_macro("FASTRNN_TORCH_VERSION", torch.version),
    ]

    define_cell = [
        # What fastrnn.define_cell compiles a cell with, and the headers that it must find.
        text_macro("FASTRNN_KERNEL_FLAGS", " ".join([*CXX_FLAGS, *KERNEL_FLAGS])),
        text_macro("FASTRNN_HEADERS", hash_of_headers(ROOT / "csrc")),
    ]
    kernels = Extension(
        "fastrnn.lib.libfastrnn_kernels",
        sources=files(*KERNEL_SOURCES),
        extra_compile_args=[*CXX_FLAGS, *KERNEL_FLAGS, *user_flags],
        extra_link_args=[
            *LINK_FLAGS,
            NO_UNDEFINED,
            "-Wl,-soname,libfastrnn_kernels.so",
            # dlopen, which newer C libraries have themselves
            "-Wl,--as-needed,-ldl",
        ],
        **common,
    )
    bindings = Extension(
        "fastrnn._C",
        sources=files("csrc/bindings/*.cpp"),
        define_macros=[
            text_macro("FASTRNN_VERSION", version),
            *define_cell,
            text_macro("FASTRNN_TORCH_VERSION", torch.version),
            text_macro("FASTRNN_CUDA_VERSION", cuda.version if cuda else ""),
            text_macro("FASTRNN_CUDA_ARCHS", ";".join(arch_names(cuda.arch_flags)) if cuda else ""),
        ],
        libraries=["fastrnn_kernels"],
        runtime_library_dirs=["$ORIGIN/lib"],
        extra_compile_args=[*CXX_FLAGS, *system_include(pybind11.get_include()), *user_flags],
        extra_link_args=LINK_FLAGS,
        **common,
    )
    ops = Extension(
        "fastrnn.lib.libfastrnn_torch",
        sources=[path for path in files("csrc/torch/*.cpp") if not path.endswith("_cuda.cpp")],
        define_macros=torch_macros,
        library_dirs=[torch.lib],
        libraries=["fastrnn_kernels", "torch_cpu"],
        runtime_library_dirs=["$ORIGIN"],
        extra_compile_args=[*CXX_FLAGS, *system_include(torch.include), *user_flags],
        extra_link_args=[*LINK_FLAGS, NO_UNDEFINED, "-Wl,-soname,libfastrnn_torch.so"],
        **common,
    )
    if cuda is None:
        return [kernels, bindings, ops]

    # cudart and cuBLAS are not linked: libtorch_cuda depends on both and loads them.
    system = system_include(torch.include, *cuda.include)
    cuda_ops = Extension(
        "fastrnn.lib.libfastrnn_torch_cuda",
        sources=[
            *files("csrc/cuda/**/*.cu"),
            "csrc/torch/arguments.cpp",
            *files("csrc/torch/*_cuda.cpp"),
        ],
        define_macros=[*torch_macros, ("USE_CUDA", "1")],
        library_dirs=[torch.lib],
        libraries=["torch_cpu", "torch_cuda"],
        extra_compile_args={
            "cxx": [*CXX_FLAGS, *system, *user_flags],
            "nvcc": [*NVCC_FLAGS, *system, *cuda.arch_flags],
        },
        extra_link_args=[*LINK_FLAGS, "-Wl,-soname,libfastrnn_torch_cuda.so"],
        **common,
    )
    return [kernels, bindings, ops, cuda_ops]


class BuildPackage(build_py):  # type: ignore[misc]
    """build_py that also packs the kernels' headers."""

    def run(self) -> None:
        super().run()
        if self.editable_mode:  # fastrnn.define_cell reads csrc/ itself
            return
        for path in kernel_headers(ROOT / "csrc"):
            target = Path(self.build_lib, "fastrnn", "include", "csrc", path)
            self.mkpath(str(target.parent))
            self.copy_file(str(ROOT / "csrc" / path), str(target))


def build_command() -> type:
    from torch.utils.cpp_extension import BuildExtension

    class BuildLibraries(BuildExtension):  # type: ignore[misc]
        """BuildExtension for plain shared libraries that link each other."""

        def finalize_options(self) -> None:
            super().finalize_options()
            self.parallel = None  # each library links an earlier one

        def get_ext_filename(self, ext_name: str) -> str:
            # setuptools passes the full name or only its last part.
            *package, name = ext_name.split(".")
            if name.startswith("lib"):  # not a Python module, so no ABI tag in the file name
                return os.path.join(*package, f"{name}.so")
            return str(super().get_ext_filename(ext_name))

        def build_extensions(self) -> None:
            # Do not use the flags that Python itself was compiled with (-march, -g, -fwrapv).
            compiler = shlex.split(os.environ.get("CXX", "c++"))
            for name in ("compiler_so", "compiler_so_cxx", "compiler_cxx"):
                self.compiler.set_executable(name, [*compiler, "-fPIC", "-DNDEBUG"])
            self.remove_stale(Path(self.build_lib))
            try:
                super().build_extensions()
            except RuntimeError as error:  # the compiler's own messages are above
                raise build_error(f"{str(error).strip().splitlines()[-1]}.") from None

        def build_extension(self, ext: Extension) -> None:
            # One folder of objects per library; otherwise they would overwrite each other's
            # build.ninja.
            shared = self.build_temp
            self.build_temp = os.path.join(shared, ext.name.rpartition(".")[2])
            ext.library_dirs.insert(0, os.path.join(self.build_lib, "fastrnn", "lib"))
            try:
                super().build_extension(ext)
            finally:
                self.build_temp = shared

        def remove_stale(self, root: Path) -> None:
            """Removes libraries of an earlier build that this build does not make, such as CUDA."""
            ours = {os.path.join(root, self.get_ext_filename(ext.name)) for ext in self.extensions}
            for path in (root / "fastrnn" / "lib").glob("libfastrnn_*.so"):
                if str(path) not in ours:
                    path.unlink()

        def copy_extensions_to_source(self) -> None:
            self.mkpath(str(ROOT / "fastrnn" / "lib"))
            self.remove_stale(ROOT)
            super().copy_extensions_to_source()

    return BuildLibraries


def main() -> None:
    os.chdir(ROOT)
    # Metadata and source archives need neither a compiler nor torch.
    compiling = {"bdist_wheel", "build", "build_ext", "develop", "editable_wheel", "install"}
    if not compiling & set(sys.argv):
        setup()
        return

    check_tools()
    torch = find_torch()
    cuda = find_cuda(torch)
    setup(
        cmdclass={"build_ext": build_command(), "build_py": BuildPackage},
        ext_modules=libraries(project_version(), torch, cuda),
    )


if __name__ == "__main__":
    main()

"""Builds the native libraries of fastrnn; everything declarative lives in pyproject.toml.

    csrc/cpu/**/*.cpp               fastrnn/lib/libfastrnn_kernels.so     no torch, no Python
    csrc/bindings/*.cpp             fastrnn/_C.<python abi>.so            pybind11, links kernels
    csrc/torch/*.cpp                fastrnn/lib/libfastrnn_torch.so       stable ABI, links kernels
    csrc/cuda/**/*.cu, ops_cuda.cpp fastrnn/lib/libfastrnn_torch_cuda.so  where CUDA is wanted;
                                    torch/arguments.cpp is compiled into both

Environment variables:
    FASTRNN_CUDA          unset: CUDA is built if nvcc and a CUDA torch are there; 1: it has to be;
                          0: it is not
    TORCH_CUDA_ARCH_LIST  GPU architectures, "8.0;9.0+PTX" unless given
    CXX, CXXFLAGS         the C++ compiler, and flags that are added after ours
    CUDA_HOME             the CUDA toolkit; otherwise that of the nvcc on PATH
    NVCC_APPEND_FLAGS     read by nvcc itself
    MAX_JOBS              how many files ninja compiles at a time
"""

from __future__ import annotations

import glob
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

ROOT = Path(__file__).resolve().parent
OLDEST_TORCH = (2, 11)
TORCH_TARGET_VERSION = "0x020b000000000000"  # the stable ABI of torch 2.11
DEFAULT_CUDA_ARCHS = "8.0;9.0+PTX"

CXX_FLAGS = ["-std=c++17", "-O3", "-g0", "-fvisibility=hidden", "-Wall", "-Wextra", "-pthread"]
# The kernels may contract a*b+c into one rounding and need neither errno nor floating-point traps;
# NaN, infinities and the order of sums stay as written. No -march: each instruction set is a pragma
# in its own source file, so that one binary runs everywhere.
KERNEL_FLAGS = ["-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math"]
# Divisions of floats may err by 2 ulp instead of 0.5: one that is exact to the last bit calls a
# function, and the gates of a cell would go through it one after the other.
NVCC_FLAGS = ["-std=c++17", "-O3", "-prec-div=false"]
NVCC_FLAGS += ["-Xcompiler=-fvisibility=hidden,-Wall,-Wextra,-g0"]
# All symbols are looked up at load time: a library that does not fit fails there, not in a call.
LINK_FLAGS = ["-pthread", "-Wl,-z,now"]
NO_UNDEFINED = "-Wl,--no-undefined"


def stop(sentence: str) -> SystemExit:
    """Returns the exception that ends the build with one sentence and no traceback."""
    return SystemExit(f"fastrnn cannot be built: {sentence}")


@dataclass(frozen=True)
class Torch:
    """The torch that is compiled against."""

    version: str
    cuda: str | None  # e.g. "13.0"
    include: str
    lib: str


@dataclass(frozen=True)
class Cuda:
    """A CUDA toolkit that fits the torch."""

    version: str
    arch_flags: list[str]
    include: list[str]


def numbers(version: str) -> tuple[int, ...]:
    return tuple(int(n) for n in re.findall(r"\d+", version)[:2])


def find_torch() -> Torch:
    try:
        import torch
    except ImportError as error:
        raise stop(
            f"torch >= 2.11 is not installed for {sys.executable} ({error}); install it first, "
            "or build without --no-build-isolation."
        ) from None
    if numbers(torch.__version__) < OLDEST_TORCH:
        raise stop(f"torch {torch.__version__} is installed and 2.11 or newer is needed.")
    root = Path(torch.__file__).parent
    version = str(torch.__version__)
    return Torch(version, torch.version.cuda, str(root / "include"), str(root / "lib"))


def check_tools() -> None:
    """Stops with one sentence if the compiler, pybind11 or ninja is missing."""
    if not sys.platform.startswith("linux"):
        raise stop(f"it is written for Linux and this is {sys.platform}.")
    compiler = shlex.split(os.environ.get("CXX", "c++"))[0]
    if shutil.which(compiler) is None:
        raise stop(
            f"there is no C++ compiler ({compiler!r} is not found); install g++ or clang, "
            "or name one in CXX."
        )
    if importlib.util.find_spec("pybind11") is None:
        raise stop("pybind11 is not installed; install it, or build without --no-build-isolation.")
    if shutil.which("ninja") is None:
        if importlib.util.find_spec("ninja") is None:
            raise stop("ninja is not installed; install it, or build without --no-build-isolation.")
        import ninja  # installed, but its folder of scripts is not on PATH

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
    """Returns the toolkit to build CUDA with, or None; obeys FASTRNN_CUDA."""
    wish = os.environ.get("FASTRNN_CUDA", "")
    if wish not in ("", "0", "1"):
        raise stop(f"FASTRNN_CUDA={wish!r} is neither 0 nor 1.")
    if wish == "0":
        print("fastrnn: without CUDA, FASTRNN_CUDA=0.")
        return None
    cuda, missing = fitting_cuda(torch)
    if missing:
        if wish == "1":
            raise stop(f"FASTRNN_CUDA=1 asks for the CUDA kernels, but {missing}.")
        print(f"fastrnn: without CUDA, {missing}.")
    return cuda


def fitting_cuda(torch: Torch) -> tuple[Cuda | None, str]:
    """Returns (toolkit, "") or (None, what is missing)."""
    if torch.cuda is None:
        return None, f"torch {torch.version} is a build without CUDA"
    nvcc = find_nvcc()
    if nvcc is None:
        return None, "no nvcc is found in CUDA_HOME, on PATH or in /usr/local/cuda"
    match = re.search(r"release (\d+\.\d+)", output_of([nvcc, "--version"]))
    if match is None:
        return None, f"{nvcc} --version does not say its version"
    version = match.group(1)
    if numbers(version)[0] != numbers(torch.cuda)[0]:
        return None, f"{nvcc} is of CUDA {version} and torch is built for CUDA {torch.cuda}"

    # nvcc may be a wrapper, or conda's, or Debian's: its own dry run tells where its headers are.
    dry_run = output_of([nvcc, "--dryrun", "-x", "cu", "-c", os.devnull, "-o", os.devnull])
    top = re.search(r"^#\$ TOP=(.+)$", dry_run, re.MULTILINE)
    include = [
        os.path.normpath(path)
        for line in re.findall(r"^#\$ INCLUDES=(.+)$", dry_run, re.MULTILINE)
        for path in re.findall(r'-I([^"\s]+)', line)
    ]
    home = os.path.normpath(top.group(1)) if top else os.path.dirname(os.path.dirname(nvcc))
    include = include or [os.path.join(home, "include")]
    # The CUDA wheels that torch depends on carry the headers that a small toolkit may lack.
    wheels = Path(torch.include).parents[1] / "nvidia"
    major = numbers(version)[0]
    include += [str(wheels / f"cu{major}" / "include"), str(wheels / "cublas" / "include")]
    # /usr/include as an explicit folder would break the compiler's own include_next.
    include = [path for path in include if os.path.isdir(path) and path != "/usr/include"]
    searched = [*include, "/usr/include"]
    for header in ("cuda_runtime.h", "cublas_v2.h"):
        if not any(os.path.exists(os.path.join(path, header)) for path in searched):
            return None, f"{header} is neither in the CUDA toolkit {home} nor beside torch"

    os.environ["CUDA_HOME"] = home  # cpp_extension calls the nvcc in there
    os.environ.setdefault("TORCH_CUDA_ARCH_LIST", DEFAULT_CUDA_ARCHS)
    from torch.utils import cpp_extension

    try:
        arch_flags = cpp_extension._get_cuda_arch_flags()
    except ValueError as error:
        archs = os.environ["TORCH_CUDA_ARCH_LIST"]
        raise stop(f"TORCH_CUDA_ARCH_LIST={archs!r} is not understood ({error}).") from None
    return Cuda(version, list(arch_flags), include), ""


def project_version() -> str:
    """The version, which pyproject.toml alone states (tomllib comes with Python 3.11 only)."""
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    match = re.search(r'^version = "([^"]+)"$', text, re.MULTILINE)
    assert match is not None
    return match.group(1)


def arch_names(flags: list[str]) -> list[str]:
    """["-gencode=arch=compute_90,code=sm_90", ...] -> ["sm_90", ...]"""
    return [flag.rpartition("code=")[2] for flag in flags]


def files(*patterns: str) -> list[str]:
    found = (
        path for pattern in patterns for path in glob.glob(pattern, root_dir=ROOT, recursive=True)
    )
    return sorted(set(found))


def system_include(*paths: str) -> list[str]:
    """Headers of others come as system headers, whose warnings are not ours."""
    return [word for path in paths for word in ("-isystem", path)]


def text_macro(name: str, value: str) -> tuple[str, str]:
    return name, f'"{value}"'


def libraries(version: str, torch: Torch, cuda: Cuda | None) -> list[Extension]:
    """Returns the libraries in the order in which they have to be linked."""
    import pybind11

    user_flags = shlex.split(os.environ.get("CXXFLAGS", ""))
    headers = files("csrc/**/*.h", "csrc/**/*.cuh")
    common: dict[str, Any] = {
        "language": "c++",
        "include_dirs": [str(ROOT / "csrc")],
        "depends": headers,
    }
    torch_macros = [
        ("TORCH_TARGET_VERSION", TORCH_TARGET_VERSION),
        # Names the torch on the command line, so that another torch means another build.
        text_macro("FASTRNN_TORCH_VERSION", torch.version),
    ]

    kernels = Extension(
        "fastrnn.lib.libfastrnn_kernels",
        sources=files("csrc/cpu/**/*.cpp"),
        extra_compile_args=[*CXX_FLAGS, *KERNEL_FLAGS, *user_flags],
        extra_link_args=[*LINK_FLAGS, NO_UNDEFINED, "-Wl,-soname,libfastrnn_kernels.so"],
        **common,
    )
    bindings = Extension(
        "fastrnn._C",
        sources=files("csrc/bindings/*.cpp"),
        define_macros=[
            text_macro("FASTRNN_VERSION", version),
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
        sources=[path for path in files("csrc/torch/*.cpp") if path != "csrc/torch/ops_cuda.cpp"],
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

    # cudart and cuBLAS are not linked: libtorch_cuda needs both and brings the copies to call.
    system = system_include(torch.include, *cuda.include)
    cuda_ops = Extension(
        "fastrnn.lib.libfastrnn_torch_cuda",
        sources=[
            *files("csrc/cuda/**/*.cu"),
            "csrc/torch/arguments.cpp",
            "csrc/torch/ops_cuda.cpp",
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


def build_command() -> type:
    from torch.utils.cpp_extension import BuildExtension

    class BuildLibraries(BuildExtension):  # type: ignore[misc]
        """BuildExtension for plain shared libraries that link each other."""

        def finalize_options(self) -> None:
            super().finalize_options()
            self.parallel = None  # a library links the one before it

        def get_ext_filename(self, ext_name: str) -> str:
            # Called with the full name or with its last part alone.
            *package, name = ext_name.split(".")
            if name.startswith("lib"):  # not a Python module: no Python ABI in its name
                return os.path.join(*package, f"{name}.so")
            return str(super().get_ext_filename(ext_name))

        def build_extensions(self) -> None:
            # The flags that Python itself was compiled with (-march, -g, -fwrapv) are not for us.
            compiler = shlex.split(os.environ.get("CXX", "c++"))
            for name in ("compiler_so", "compiler_so_cxx", "compiler_cxx"):
                self.compiler.set_executable(name, [*compiler, "-fPIC", "-DNDEBUG"])
            self.remove_stale(Path(self.build_lib))
            try:
                super().build_extensions()
            except RuntimeError as error:  # the compiler's own messages are above
                raise stop(f"{str(error).strip().splitlines()[-1]}.") from None

        def build_extension(self, ext: Extension) -> None:
            # One folder of objects a library, or one build.ninja would overwrite the other.
            shared = self.build_temp
            self.build_temp = os.path.join(shared, ext.name.rpartition(".")[2])
            ext.library_dirs.insert(0, os.path.join(self.build_lib, "fastrnn", "lib"))
            try:
                super().build_extension(ext)
            finally:
                self.build_temp = shared

        def remove_stale(self, root: Path) -> None:
            """Removes libraries of an earlier build, say with CUDA, that this one does not make."""
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
    # Metadata and source archives are made without a compiler and without torch.
    compiling = {"bdist_wheel", "build", "build_ext", "develop", "editable_wheel", "install"}
    if not compiling & set(sys.argv):
        setup()
        return

    check_tools()
    torch = find_torch()
    cuda = find_cuda(torch)
    setup(
        cmdclass={"build_ext": build_command()},
        ext_modules=libraries(project_version(), torch, cuda),
    )


if __name__ == "__main__":
    main()

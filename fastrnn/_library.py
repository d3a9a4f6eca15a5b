"""Loads the libraries that hold the kernels' operators, once."""

from __future__ import annotations

import atexit
import ctypes
import warnings
from pathlib import Path
from typing import Any

import torch

_PACKAGE = Path(__file__).parent

try:
    import fastrnn._C as _C
except ImportError as error:
    raise ImportError(
        f"fastrnn: the compiled module fastrnn._C is not usable in {_PACKAGE} ({error}); in a "
        "source tree run `pip install -e .`, elsewhere install fastrnn again."
    ) from error

_C.check_settings()  # a bad value ends the import, not a call much later

#: whether CUDA kernels are loaded, and if not, why
cuda_kernels = False
why_no_cuda = "not loaded yet"


def load() -> None:
    """Registers the operators of `torch.ops.fastrnn`: the CPU's, and CUDA's where torch has CUDA.

    Raises:
        ImportError: a library is missing or does not load.
    """
    global cuda_kernels, why_no_cuda
    if hasattr(torch.ops.fastrnn, "recurrent_forward"):
        return
    _load_library("libfastrnn_torch.so")
    # Ranks of a team wait for each other: they need threads of their own, as OpenMP gives them.
    if "ATen parallel backend: OpenMP" not in torch.__config__.parallel_info():
        _C.set_max_threads(1)
    _warn_of_another_cuda()
    why_no_cuda = _reason_against_cuda()
    if not why_no_cuda:
        _load_library("libfastrnn_torch_cuda.so")
        torch.ops.fastrnn.read_tf32_from(_tf32_address())
        atexit.register(torch.ops.fastrnn.read_tf32_from, 0)
        cuda_kernels = True


def _reason_against_cuda() -> str:
    """Why the library with the CUDA kernels is not to be loaded, "" if it is."""
    built_for, here = _C.build_info()["cuda_version"], torch.version.cuda
    if built_for is None:
        return "fastrnn was built without CUDA"
    if here is None:
        return f"torch {torch.__version__} is a build without CUDA"
    if _is_another_cuda(built_for, here):
        return f"fastrnn was built for CUDA {built_for} and torch has CUDA {here}"
    return ""


def _is_tf32_allowed() -> int:
    """Whether float32 layers on a GPU may use TF32: as ``nn.LSTM``, by cuDNN's switch for RNNs."""
    rnn: Any = torch.backends.cudnn.rnn
    return int(rnn.fp32_precision == "tf32")


_callback = ctypes.CFUNCTYPE(ctypes.c_int)(_is_tf32_allowed)  # C++ has its address: it stays


def _tf32_address() -> int:
    """Where C++ finds `_is_tf32_allowed`, which it calls before each layer."""
    return ctypes.cast(_callback, ctypes.c_void_p).value or 0


def _is_another_cuda(built_for: str | None, here: str | None) -> bool:
    """Whether both have CUDA, of different majors.

    The library calls the CUDA runtime that torch brings, whose interface changes with the major.
    """
    return bool(built_for and here) and str(built_for).split(".")[0] != str(here).split(".")[0]


def _warn_of_another_cuda() -> None:
    built_for, here = _C.build_info()["cuda_version"], torch.version.cuda
    if _is_another_cuda(built_for, here):
        warnings.warn(
            f"fastrnn was built for CUDA {built_for} and torch has CUDA {here}: fastrnn runs on "
            f"the CPU only. Install a fastrnn that was built for CUDA {str(here).split('.')[0]}.",
            stacklevel=2,
        )


def _load_library(name: str) -> None:
    path = _PACKAGE / "lib" / name
    try:
        torch.ops.load_library(str(path))
    except OSError as error:
        raise ImportError(
            f"fastrnn: {name} cannot be loaded with torch {torch.__version__} ({error}); "
            "install fastrnn again."
        ) from error

"""Loads the libraries that contain the kernels' operators, once."""

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

_C.check_settings()  # an invalid environment variable raises here, not in a later call

#: whether the CUDA kernels are loaded; if not, why_no_cuda is the reason
cuda_kernels = False
why_no_cuda = "not loaded yet"


def load() -> None:
    """Registers the operators of `torch.ops.fastrnn` for the CPU and, if torch has CUDA, for CUDA.

    Raises:
        ImportError: a library is missing or cannot be loaded.
    """
    global cuda_kernels, why_no_cuda
    if hasattr(torch.ops.fastrnn, "recurrent_forward"):
        return
    _load_library("libfastrnn_torch.so")
    # The threads of a team wait for each other, so they must run at the same time. Only torch's
    # OpenMP backend ensures that.
    if "ATen parallel backend: OpenMP" not in torch.__config__.parallel_info():
        _C.set_max_threads(1)
    _warn_of_other_cuda_major()
    why_no_cuda = _reason_against_cuda()
    if not why_no_cuda:
        _load_library("libfastrnn_torch_cuda.so")
        torch.ops.fastrnn.read_tf32_from(_tf32_address())
        atexit.register(torch.ops.fastrnn.read_tf32_from, 0)
        cuda_kernels = True


def _reason_against_cuda() -> str:
    """Returns the reason not to load the library with the CUDA kernels, "" if there is none."""
    built_for, here = _C.build_info()["cuda_version"], torch.version.cuda
    if built_for is None:
        return "fastrnn was built without CUDA"
    if here is None:
        return f"torch {torch.__version__} is a build without CUDA"
    if _has_other_cuda_major(built_for, here):
        return f"fastrnn was built for CUDA {built_for} and torch has CUDA {here}"
    return ""


def _is_tf32_allowed() -> int:
    """Whether float32 layers on a GPU may use TF32: cuDNN's switch for RNNs, as in ``nn.LSTM``."""
    rnn: Any = torch.backends.cudnn.rnn
    return int(rnn.fp32_precision == "tf32")


_callback = ctypes.CFUNCTYPE(ctypes.c_int)(_is_tf32_allowed)  # kept alive: C++ has its address


def _tf32_address() -> int:
    """Returns the address of `_is_tf32_allowed`, which C++ calls before each layer."""
    return ctypes.cast(_callback, ctypes.c_void_p).value or 0


def _has_other_cuda_major(built_for: str | None, here: str | None) -> bool:
    """Whether both have CUDA, but different major versions.

    The library calls torch's CUDA runtime, whose interface changes with the major version.
    """
    return bool(built_for and here) and str(built_for).split(".")[0] != str(here).split(".")[0]


def _warn_of_other_cuda_major() -> None:
    built_for, here = _C.build_info()["cuda_version"], torch.version.cuda
    if _has_other_cuda_major(built_for, here):
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

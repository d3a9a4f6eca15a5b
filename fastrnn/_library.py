"""Loads the libraries that hold the kernels' operators, once."""

from __future__ import annotations

from pathlib import Path

import torch

from fastrnn import _C

_FOLDER = Path(__file__).parent / "lib"

#: whether CUDA kernels are loaded, and if not, why
cuda_kernels = False
why_no_cuda = "not loaded yet"


def load() -> None:
    """Registers the operators of `torch.ops.fastrnn`: the CPU's, and CUDA's where torch has CUDA."""
    global cuda_kernels, why_no_cuda
    if hasattr(torch.ops.fastrnn, "layer_forward"):
        return
    _load_library("libfastrnn_torch.so")
    # Ranks of a team wait for each other: they need threads of their own, as OpenMP gives them.
    if "ATen parallel backend: OpenMP" not in torch.__config__.parallel_info():
        _C.set_max_threads(1)
    if not _C.build_info()["cuda"]:
        why_no_cuda = "fastrnn was built without CUDA"
    elif torch.version.cuda is None:
        why_no_cuda = f"torch {torch.__version__} is a build without CUDA"
    else:
        _load_library("libfastrnn_torch_cuda.so")
        cuda_kernels, why_no_cuda = True, ""


def _load_library(name: str) -> None:
    path = _FOLDER / name
    try:
        torch.ops.load_library(str(path))
    except OSError as error:
        raise ImportError(
            f"fastrnn: {name} cannot be loaded with torch {torch.__version__} ({error}); "
            "install fastrnn again."
        ) from error

"""Where the header and the library of the C interface are (docs/c_interface.md)."""

from __future__ import annotations

from pathlib import Path

__all__ = ["get_include", "get_library"]

_PACKAGE = Path(__file__).resolve().parent


def get_include() -> str:
    """Returns the folder of ``fastrnn.h``, for the compiler's ``-I``."""
    return str(_PACKAGE / "include")


def get_library() -> str:
    """Returns the path of the shared library with the C interface, which needs no torch.

    ``python -m fastrnn info --cflags --libs`` prints the flags to compile and link with it.
    """
    return str(_PACKAGE / "lib" / "libfastrnn_kernels.so")


def compile_flags() -> list[str]:
    """Returns the compiler's flags for sources that include ``fastrnn.h``."""
    return [f"-I{get_include()}"]


def link_flags() -> list[str]:
    """Returns the flags for linking a program that finds the library where it is now."""
    folder = str(Path(get_library()).parent)
    return [f"-L{folder}", "-lfastrnn_kernels", f"-Wl,-rpath,{folder}"]

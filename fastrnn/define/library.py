"""Compiles a cell once per instruction set, keeps it in a cache folder, and loads it."""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import shlex
import shutil
import subprocess
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path

from fastrnn import _C

try:
    import fcntl
except ImportError:  # not Linux
    fcntl = None  # type: ignore[assignment]

_PACKAGE = Path(__file__).parents[1]
_FOLDERS = ("cells", "cpu", "problem")
_DIGEST = 32  # bytes of the hash at the end of a library
_COMPILERS = ("c++", "g++", "clang++")

_TEMPLATE = """\
// The kernels of a cell of fastrnn.define_cell, for one instruction set.
#include "cpu/isa/{isa}_target.h"
#include "cpu/kernels/defined_cell.h"

// Variables of the cell, which must not be macros of a header.
{variables}
FASTRNN_TARGET_BEGIN
{source}FASTRNN_TARGET_END

FASTRNN_DEFINE_CELL(::fastrnn::cells::DefinedCell, "{name}")
"""

#: for each cell and instruction set that was tried: why it runs as torch operations, or ""
_tried: dict[tuple[str, str], str] = {}
_warned: set[str] = set()


def load(name: str, source: str) -> str:
    """Makes the kernels of a cell available, and compiles them if the cache does not have them.

    Args:
        name: of the cell for the operators.
        source: the struct ``DefinedCell`` in C++.

    Returns:
        "" or the reason why there are no kernels; the first time, a warning shows it.

    Raises:
        RuntimeError: the headers are not those that fastrnn was compiled with.
    """
    isa = _C.cpu_capability()
    if (name, isa) not in _tried:
        reason = _load(name, source, isa)
        if reason and reason not in _warned:
            _warned.add(reason)
            warnings.warn(
                f"fastrnn.define_cell: {reason}; cells run as torch operations, which is slow.",
                RuntimeWarning,
                stacklevel=4,
            )
        _tried[name, isa] = reason
    return _tried[name, isa]


def cache_folder() -> Path:
    """Returns the folder of compiled cells: FASTRNN_CACHE, else fastrnn in the user's cache."""
    own = os.environ.get("FASTRNN_CACHE")
    if own:
        return Path(own).expanduser().absolute()
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "fastrnn"


def include_folder() -> Path:
    """Returns the folder of the kernels' headers: in a wheel, or in the source tree."""
    packed = _PACKAGE / "include" / "csrc"
    return packed if packed.is_dir() else _PACKAGE.parent / "csrc"


def hash_of_headers(folder: Path) -> str:
    """Returns a hash of the kernels' headers. `setup.py` computes the same."""
    digest = hashlib.sha256()
    found = (path for part in _FOLDERS for path in (folder / part).rglob("*.h"))
    for path in sorted(path.relative_to(folder) for path in found):
        digest.update(f"{path.as_posix()}\n".encode())
        digest.update((folder / path).read_bytes())
    return digest.hexdigest()[:16]


def _load(name: str, source: str, isa: str) -> str:
    build = _C.build_info()
    variables = sorted(set(re.findall(r"(?:const A|A) (\w+) =", source)))
    undefined = "".join(f"#undef {variable}\n" for variable in variables)
    code = _TEMPLATE.format(isa=isa, source=source, name=name, variables=undefined)
    parts = "\n".join((code, build["headers"], build["kernel_flags"]))
    key = hashlib.sha256(parts.encode()).hexdigest()[:16]
    try:
        folder = cache_folder()
    except RuntimeError:  # neither HOME nor an entry in the list of users
        return "there is no home directory for the cache folder; set FASTRNN_CACHE"
    library = folder / f"{name}-{isa}-{key}.so"
    try:
        if _add(library):
            return ""
        if _is_noexec(folder):
            return (
                f"the cache folder {folder} is on a file system mounted noexec, from which no "
                "library can be loaded; set FASTRNN_CACHE to a folder on another one"
            )
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        with _locked(folder / f"{library.stem}.lock"):
            if _add(library):  # another process has compiled it
                return ""
            reason = _compile(code, library)
    except OSError as error:
        return f"the cache folder {folder} is not usable ({error.strerror}); set FASTRNN_CACHE"
    if reason:
        return reason
    try:
        _C.add_defined_cell(str(library))
    except ValueError as error:
        return str(error).removesuffix(".")
    return ""


def _add(library: Path) -> bool:
    """Loads a library of the cache. False if there is none, or a damaged one."""
    try:
        data = library.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        return False
    if data[-_DIGEST:] != hashlib.sha256(data[:-_DIGEST]).digest():
        return False
    try:
        _C.add_defined_cell(str(library))
    except ValueError:
        return False
    return True


def _is_noexec(folder: Path) -> bool:
    """Whether no library can be loaded from a folder, or from the one that it will be made in."""
    while not folder.is_dir() and folder != folder.parent:
        folder = folder.parent
    return bool(os.statvfs(folder).f_flag & os.ST_NOEXEC)


def _compile(code: str, library: Path) -> str:
    """Compiles a cell; returns "" or the reason why that is not possible."""
    include = include_folder()
    build = _C.build_info()
    if not include.is_dir():
        return f"the kernels' headers are not in {include}"
    found = hash_of_headers(include)
    if found != build["headers"]:
        raise RuntimeError(
            f"fastrnn.define_cell: the headers in {include} must be those that fastrnn was "
            f"compiled with, {build['headers']}, got {found}. Build or install fastrnn again."
        )
    compiler = find_compiler()
    if compiler is None:
        return "there is no C++ compiler (CXX, c++, g++ or clang++)"
    # In the cache folder, so that the finished library can be moved to its place in one step.
    with tempfile.TemporaryDirectory(dir=library.parent) as folder:
        source = Path(folder, "cell.cpp")
        source.write_text(code, encoding="utf-8")
        result = Path(folder, "cell.so")
        command = [
            *(*compiler, *build["kernel_flags"].split(), "-fPIC", "-shared", "-DNDEBUG", "-w"),
            f'-DFASTRNN_HEADERS="{build["headers"]}"',
            *("-I", str(include), str(source), "-o", str(result)),
            *(str(_PACKAGE / "lib" / "libfastrnn_kernels.so"), "-Wl,-z,now"),
        ]
        try:
            run = subprocess.run(command, capture_output=True, text=True, check=False)
        except OSError as error:
            return f"the compiler {compiler[0]} does not run ({error.strerror})"
        if run.returncode != 0:
            lines = [line for line in run.stderr.splitlines() if "error" in line] or ["no message"]
            return f"the compiler {compiler[0]} failed ({lines[0].strip()})"
        with open(result, "ab") as file:  # loading a damaged library could end the process
            file.write(hashlib.sha256(result.read_bytes()).digest())
        os.replace(result, library)
    return ""


def find_compiler() -> list[str] | None:
    """Returns the command of the C++ compiler, or None."""
    own = shlex.split(os.environ.get("CXX", ""))
    if own:
        return own if shutil.which(own[0]) else None
    for name in _COMPILERS:
        path = shutil.which(name)
        if path is not None:
            return [path]
    return None


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Holds a lock, so that of several processes one compiles and the others wait."""
    try:
        file = open(path, "w")  # noqa: SIM115 - closed below
    except OSError:
        yield
        return
    try:
        # some network file systems have no locks: then each process compiles
        with contextlib.suppress(OSError):
            if fcntl is not None:
                fcntl.flock(file, fcntl.LOCK_EX)
        yield
    finally:
        file.close()

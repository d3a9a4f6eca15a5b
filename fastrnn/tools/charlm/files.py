"""Reading of files that the user names, with one-line errors."""

from __future__ import annotations

import stat
from pathlib import Path

from .errors import CharlmError


def read_regular_file(path: Path, error: type[CharlmError]) -> bytes:
    """Returns the content of a regular file.

    A pipe or a device raises an error, because reading it could block or never end.

    Args:
        path: the file.
        error: class of the exception to raise.

    Raises:
        CharlmError: the file is missing, not readable, a folder, a pipe or a device.
    """
    try:
        kind = path.stat().st_mode
        if stat.S_ISDIR(kind):
            raise error(f"{path}: is a folder, not a file")
        if not stat.S_ISREG(kind):
            raise error(f"{path}: is not a regular file")
        return path.read_bytes()
    except (OSError, ValueError) as problem:  # ValueError: an invalid file name
        reason = problem.strerror if isinstance(problem, OSError) else None
        raise error(f"{path}: cannot be read ({reason or problem})") from problem

"""Reading of the user's files: a file that cannot be read is an error of one sentence."""

from __future__ import annotations

import stat
from pathlib import Path

from .errors import CharlmError


def read_regular_file(path: Path, error: type[CharlmError]) -> bytes:
    """Returns the content of a regular file.

    A pipe or a device is an error: reading it could wait or go on for ever.

    Args:
        path: the file.
        error: the class of the exception.

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
    except (OSError, ValueError) as problem:  # ValueError: a name that no file can have
        reason = problem.strerror if isinstance(problem, OSError) else None
        raise error(f"{path}: cannot be read ({reason or problem})") from problem

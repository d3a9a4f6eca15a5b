"""Prints the requirements of an extra in pyproject.toml, or of the build (``build``), one per line.

Includes the requirements of extras that the extra names. Skips fastrnn itself.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path

import tomllib

PROJECT = tomllib.loads(Path(__file__).parents[1].joinpath("pyproject.toml").read_text())


def requirements(extra: str) -> Iterator[str]:
    if extra == "build":
        yield from PROJECT["build-system"]["requires"]
        return
    for requirement in PROJECT["project"]["optional-dependencies"][extra]:
        inner = re.fullmatch(r"fastrnn\[(.+)\]", requirement)
        if inner is None:
            yield requirement
        else:
            for name in inner.group(1).split(","):
                yield from requirements(name)


print("\n".join(dict.fromkeys(requirements(sys.argv[1]))))

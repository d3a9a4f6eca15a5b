"""The command line ``fastrnn``: ``charlm`` with its commands, ``compare`` and ``info``."""

from __future__ import annotations

import argparse
import importlib.util
import io
import json
import os
import shlex
import signal
import sys
from collections.abc import Sequence

import fastrnn
from fastrnn import c_interface

#: packages that ``fastrnn charlm`` needs besides torch
CHARLM_PACKAGES = ("rich", "matplotlib", "safetensors", "numpy")


class _Parser(argparse.ArgumentParser):
    """An argparse parser that prints an error as one line, without the usage."""

    def error(self, message: str) -> None:  # type: ignore[override]
        self.exit(2, f"{self.prog}: {message} (--help lists the options)\n")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command line and returns its exit code.

    Args:
        arguments: the arguments without the name of the program; default: those of the process.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    if isinstance(sys.stdout, io.TextIOWrapper):
        # A sample may contain characters that the encoding of the terminal lacks.
        sys.stdout.reconfigure(errors="replace")
    try:
        return _run(given)
    except BrokenPipeError:  # the reader of the pipe has exited, for example `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    except KeyboardInterrupt:
        print("fastrnn: interrupted", file=sys.stderr)
        return 130


def _run(given: list[str]) -> int:
    if given[:1] == ["charlm"]:
        missing = [name for name in CHARLM_PACKAGES if importlib.util.find_spec(name) is None]
        if missing:
            print(
                f"fastrnn charlm: missing packages: {', '.join(missing)}; "
                "install: pip install 'fastrnn[charlm]'",
                file=sys.stderr,
            )
            return 2
        from fastrnn.tools.charlm import command

        return command.main(given[1:], _Parser)

    if given[:1] == ["compare"]:
        from fastrnn.tools.benchmark import command as compare_command

        return compare_command.main(given[1:], _Parser)

    parser = _Parser(prog="fastrnn", description="Fast recurrent layers for PyTorch.")
    parser.add_argument("--version", action="version", version=f"fastrnn {fastrnn.__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    commands.add_parser(
        "charlm", help="train, compare, sample and inspect a character-level language model"
    )
    commands.add_parser("compare", help="time fastrnn, torch.nn and other libraries on a shape")
    about = commands.add_parser("info", help="show versions, CPU, CUDA and execution plans")
    about.add_argument("--json", action="store_true", help="print JSON")
    about.add_argument("--cflags", action="store_true", help="print the flags to compile C with")
    about.add_argument("--libs", action="store_true", help="print the flags to link C with")
    options = parser.parse_args(given)

    if options.cflags or options.libs:
        flags = c_interface.compile_flags() if options.cflags else []
        print(shlex.join(flags + (c_interface.link_flags() if options.libs else [])))
        return 0

    from fastrnn.tools import info

    if options.json:
        print(json.dumps(info.info(), indent=1))
    else:
        print("\n".join(info.lines()))
    return 0

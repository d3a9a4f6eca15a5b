"""``fastrnn compare``: times a shape with fastrnn and every other installed library."""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Final, TextIO

import torch

from fastrnn.tools import info

from .measure import Measurement, machine, measure, plan
from .peers import FASTRNN, LIBRARIES, Library, installed_libraries
from .shapes import CELLS, MODES, Shape, Task

MakeParser = Callable[..., argparse.ArgumentParser]

#: measured by default, when the command line gives no shape
DEFAULT_SHAPES: Final = (
    Shape("", 100, 1, 64, 64),
    Shape("", 100, 1, 256, 256),
    Shape("", 100, 16, 128, 128),
    Shape("", 35, 20, 650, 650),
    Shape("", 100, 16, 128, 128, 2, packed=True),
)
#: options that give a shape, and their help
_SIZE_HELP: Final = {
    "T": "steps per sequence",
    "B": "sequences per batch",
    "input": "size of the input (default: the hidden size)",
    "hidden": "size of the hidden state",
    "layers": "stacked layers",
}
#: used for the missing sizes when at least one size is given
_DEFAULT_SIZES: Final = {"T": 100, "B": 1, "hidden": 128, "layers": 1}
MAX_SIZE: Final = 1_000_000  # upper bound of each size

HEADER: Final = ("library", "ms", "ratio", "GFLOP/s", "% of peak", "error")


class CompareError(Exception):
    """An argument is invalid or a file cannot be written. The message is one line."""

    def __init__(self, text: str, exit_code: int = 2) -> None:
        super().__init__(text)
        self.exit_code = exit_code


def main(arguments: Sequence[str], make_parser: MakeParser) -> int:
    """Runs ``fastrnn compare``.

    Args:
        arguments: the arguments after ``compare``.
        make_parser: creates an argument parser that exits with code 2 on an error.

    Returns:
        0; 1 if a library's results differ from those of ``torch.nn``; 2 for a wrong argument.
    """
    try:
        return compare(_parser(make_parser).parse_args(arguments), sys.stdout)
    except CompareError as error:
        print(f"fastrnn compare: {error}", file=sys.stderr)
        return error.exit_code
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, MemoryError) and "can't allocate memory" not in str(error):
            raise
        print("fastrnn compare: out of memory; try smaller sizes", file=sys.stderr)
        return 1


def _parser(make_parser: MakeParser) -> argparse.ArgumentParser:
    parser = make_parser(
        prog="fastrnn compare",
        allow_abbrev=False,
        description="Checks that fastrnn, torch.nn and, if installed, ONNX Runtime and OpenVINO "
        "agree, then times them on the CPU with interleaved calls. Measures a few common shapes "
        "unless the options give one.",
    )
    parser.add_argument(
        "--cell",
        nargs="+",
        choices=CELLS,
        default=CELLS,
        metavar="NAME",
        help=f"{', '.join(CELLS)} (default: all)",
    )
    for name, meaning in _SIZE_HELP.items():
        default = f" (default: {_DEFAULT_SIZES[name]})" if name in _DEFAULT_SIZES else ""
        parser.add_argument(f"--{name}", type=int, metavar="N", help=meaning + default)
    parser.add_argument("--bidirectional", action="store_true", help="both directions")
    parser.add_argument(
        "--packed", action="store_true", help="packed sequences of lengths T/B, 2T/B ... T"
    )
    parser.add_argument(
        "--mode",
        nargs="+",
        choices=MODES,
        default=MODES,
        metavar="NAME",
        help="forward: inference; training: forward and backward (default: both)",
    )
    parser.add_argument(
        "--threads", type=int, metavar="N", help="CPU threads (default: torch's choice)"
    )
    parser.add_argument(
        "--seconds",
        type=float,
        default=0.3,
        metavar="X",
        help="time to spend per library and task (default: 0.3)",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the results here")
    return parser


def compare(options: argparse.Namespace, stream: TextIO) -> int:
    """Measures and prints the requested tasks, and returns the exit code.

    Raises:
        CompareError: an option is invalid or the JSON file cannot be written.
    """
    shapes = _shapes(options)
    if not 0 < options.seconds <= 600:
        raise CompareError(f"--seconds must be above 0 and at most 600, got {options.seconds}")
    if options.threads is not None:
        _check("threads", options.threads, 1024)
        torch.set_num_threads(options.threads)
    if options.json:
        _write(options.json, "")
    threads, libraries = torch.get_num_threads(), installed_libraries()
    about = machine(threads, libraries)
    for line in _introduction(about, libraries):
        print(line, file=stream)
    peak, results, rejected = 0.0, [], []
    for shape in shapes:
        for cell in dict.fromkeys(options.cell):
            for mode in dict.fromkeys(options.mode):
                task = Task(cell, mode, shape, threads)
                found = measure(task, libraries, options.seconds)
                peak = max(peak, found.fma_peak)
                results.append(_as_json(found))
                _show(found, peak, stream)
                rejected += [f"{task.label}: {text}" for text in found.rejected.values()]
    if options.json:
        document = {"machine": about, "fma_peak": peak, "results": results}
        _write(options.json, json.dumps(document, indent=1) + "\n")
    for text in rejected:
        print(f"fastrnn compare: {text}", file=sys.stderr)
    return 1 if rejected else 0


def _shapes(options: argparse.Namespace) -> tuple[Shape, ...]:
    given = {name: size for name in _SIZE_HELP if (size := getattr(options, name)) is not None}
    for name, size in given.items():
        _check(name, size, MAX_SIZE)
    if not given:
        if options.bidirectional or options.packed:
            raise CompareError("--bidirectional and --packed need a shape, such as --hidden 128")
        return DEFAULT_SHAPES
    sizes = {**_DEFAULT_SIZES, **given}
    return (
        Shape(
            "",
            sizes["T"],
            sizes["B"],
            sizes.get("input", sizes["hidden"]),
            sizes["hidden"],
            sizes["layers"],
            options.bidirectional,
            options.packed,
        ),
    )


def _check(name: str, value: int, largest: int) -> None:
    if not 1 <= value <= largest:
        raise CompareError(f"--{name} must be a whole number from 1 to {largest:,}, got {value:,}")


def _write(path: Path, text: str) -> None:
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise CompareError(f"--json {path}: cannot be written ({error.strerror})") from error


def _introduction(about: dict[str, Any], libraries: Sequence[Library]) -> Iterator[str]:
    yield "  ".join(f"{key} {value}" for key, value in about.items())
    yield (
        "ratio: time of the library / time of fastrnn; peak: multiply-adds alone, measured in "
        "this run; error: largest relative error against float64"
    )
    missing = [
        library.title
        for library in LIBRARIES
        if library not in libraries and "float32" in library.cells
    ]
    if missing:
        yield f"not installed: {', '.join(missing)}; install: pip install 'fastrnn[bench]'"


def _as_json(found: Measurement) -> dict[str, Any]:
    task = found.task
    return {
        "cell": task.cell,
        "mode": task.mode,
        "point": task.shape.label,
        "flops": task.flops,
        "ms": {name: seconds * 1e3 for name, seconds in found.medians.items()},
        "ratio": found.ratio,
        "error": found.errors,
        "refused": found.rejected,
        "plan": plan(task),
    }


def rows(found: Measurement, peak: float) -> list[tuple[str, ...]]:
    """Returns the table of a measurement, one row per library, with the columns of `HEADER`.

    Args:
        found: the measurement.
        peak: peak speed of the machine, GFLOP/s.
    """
    times = found.medians
    own = times.get(FASTRNN.name)
    table: list[tuple[str, ...]] = []
    for library in LIBRARIES:
        name = library.name
        if name in found.rejected:
            table.append((library.title, "differs", "", "", "", ""))
        elif name in times:
            speed = found.task.flops / times[name] * 1e-9
            table.append(
                (
                    library.title,
                    f"{times[name] * 1e3:.3f}",
                    f"{times[name] / own:.2f}" if own else "",
                    f"{speed:.1f}",
                    f"{100 * speed / peak:.0f}",
                    f"{found.errors[name]:.1e}",
                )
            )
    return table


def _show(found: Measurement, peak: float, stream: TextIO) -> None:
    title = found.task.label
    if found.ratio is not None:
        title += f": {found.ratio:.2f} (best other library / fastrnn)"
    table = rows(found, peak)
    print(f"\n{title}", file=stream)
    if stream.isatty() and importlib.util.find_spec("rich") is not None:
        _show_rich(table, stream)
    else:
        for row in (HEADER, *table):
            line = f"  {row[0]:<13}" + "".join(f"{text:>10}" for text in row[1:])
            print(line.rstrip(), file=stream)
    chosen = info.plan_text(plan(found.task), found.task.mode == "forward")
    print(f"  {chosen}", file=stream, flush=True)


def _show_rich(table: Sequence[tuple[str, ...]], stream: TextIO) -> None:
    from rich.console import Console
    from rich.table import Table

    shown = Table(box=None, padding=(0, 2))
    for index, name in enumerate(HEADER):
        shown.add_column(name, justify="right" if index else "left")
    for row in table:
        shown.add_row(*row, style="bold" if row[0] == FASTRNN.title else None)
    Console(file=stream, highlight=False).print(shown)

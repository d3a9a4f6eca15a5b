"""What ``fastrnn compare`` does: your shape, by fastrnn and by every other library that is here."""

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
from .shapes import CELLS, MODES, Point, Task

MakeParser = Callable[..., argparse.ArgumentParser]

#: what is measured where no shape is given
POINTS: Final = (
    Point("", 100, 1, 64, 64),
    Point("", 100, 1, 256, 256),
    Point("", 100, 16, 128, 128),
    Point("", 35, 20, 650, 650),
    Point("", 100, 16, 128, 128, 2, packed=True),
)
#: the options of a shape
_SIZES: Final = {
    "T": "steps",
    "B": "sequences in a batch",
    "input": "size of the input (default: that of the hidden state)",
    "hidden": "size of the hidden state",
    "layers": "stacked layers",
}
_DEFAULTS: Final = {"T": 100, "B": 1, "hidden": 128, "layers": 1}  # beside others that are given
LARGEST: Final = 1_000_000  # for each size

HEADER: Final = ("library", "ms", "ratio", "GFLOP/s", "% of peak", "error")


class CompareError(Exception):
    """Something the user gave cannot be used, or went wrong; the text is one sentence."""

    def __init__(self, text: str, exit_code: int = 2) -> None:
        super().__init__(text)
        self.exit_code = exit_code


def main(arguments: Sequence[str], make_parser: MakeParser) -> int:
    """Runs ``fastrnn compare`` with these arguments.

    Args:
        arguments: what follows ``compare``.
        make_parser: makes an argument parser, whose errors exit with 2.

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
        print("fastrnn compare: out of memory: try smaller sizes", file=sys.stderr)
        return 1


def _parser(make_parser: MakeParser) -> argparse.ArgumentParser:
    parser = make_parser(
        prog="fastrnn compare",
        allow_abbrev=False,
        description="Times fastrnn, torch.nn and, if they are installed, ONNX Runtime and OpenVINO "
        "in turns on the CPU, after checking that they agree. Without a shape: on a few.",
    )
    parser.add_argument(
        "--cell",
        nargs="+",
        choices=CELLS,
        default=CELLS,
        metavar="NAME",
        help=f"{', '.join(CELLS)} (default: all)",
    )
    for name, meaning in _SIZES.items():
        default = f" (default: {_DEFAULTS[name]})" if name in _DEFAULTS else ""
        parser.add_argument(f"--{name}", type=int, metavar="N", help=meaning + default)
    parser.add_argument("--bidirectional", action="store_true", help="both directions")
    parser.add_argument(
        "--packed", action="store_true", help="sequences of the lengths T/B, 2T/B ... T"
    )
    parser.add_argument(
        "--mode",
        nargs="+",
        choices=MODES,
        default=MODES,
        metavar="NAME",
        help=f"{' or '.join(MODES)}, that is forward and backward (default: both)",
    )
    parser.add_argument(
        "--threads", type=int, metavar="N", help="of the CPU (default: as torch decides)"
    )
    parser.add_argument(
        "--seconds", type=float, default=0.3, metavar="X", help="for each library (default: 0.3)"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write it all there as well")
    return parser


def compare(options: argparse.Namespace, stream: TextIO) -> int:
    """Measures as the options say, prints as it goes, and returns the exit code.

    Raises:
        CompareError: an option cannot be used.
    """
    points = _points(options)
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
    peak, results, refused = 0.0, [], []
    for point in points:
        for cell in dict.fromkeys(options.cell):
            for mode in dict.fromkeys(options.mode):
                task = Task(cell, mode, point, threads)
                found = measure(task, libraries, options.seconds)
                peak = max(peak, found.fma_peak)
                results.append(_as_json(found))
                _show(found, peak, stream)
                refused += [f"{task.label}: {text}" for text in found.refused.values()]
    if options.json:
        document = {"machine": about, "fma_peak": peak, "results": results}
        _write(options.json, json.dumps(document, indent=1) + "\n")
    for text in refused:
        print(f"fastrnn compare: {text}", file=sys.stderr)
    return 1 if refused else 0


def _points(options: argparse.Namespace) -> tuple[Point, ...]:
    given = {name: size for name in _SIZES if (size := getattr(options, name)) is not None}
    for name, size in given.items():
        _check(name, size, LARGEST)
    if not given:
        if options.bidirectional or options.packed:
            raise CompareError("--bidirectional and --packed need a shape, such as --hidden 128")
        return POINTS
    sizes = {**_DEFAULTS, **given}
    return (
        Point(
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
        "ratio: a library's time over fastrnn's; peak: multiply-adds alone, measured in this run; "
        "error: the largest against float64"
    )
    missing = [library.title for library in LIBRARIES if library not in libraries]
    if missing:
        yield f"not installed: {', '.join(missing)}; pip install 'fastrnn[bench]' brings them"


def _as_json(found: Measurement) -> dict[str, Any]:
    task = found.task
    return {
        "cell": task.cell,
        "mode": task.mode,
        "point": task.point.label,
        "flops": task.flops,
        "ms": {name: seconds * 1e3 for name, seconds in found.medians.items()},
        "ratio": found.ratio,
        "error": found.errors,
        "refused": found.refused,
        "plan": plan(task),
    }


def rows(found: Measurement, peak: float) -> list[tuple[str, ...]]:
    """The table of a measurement, one line a library, under `HEADER`.

    Args:
        found: what was measured.
        peak: the machine's, GFLOP/s.
    """
    times = found.medians
    own = times.get(FASTRNN.name)
    table: list[tuple[str, ...]] = []
    for library in LIBRARIES:
        name = library.name
        if name in found.refused:
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
        title += f": {found.ratio:.2f} (the best other / fastrnn)"
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

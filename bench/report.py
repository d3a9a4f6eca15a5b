"""Reads what ``pytest bench --benchmark-json RESULT.json`` wrote and makes a report of it.

    python bench/report.py RESULT.json [--out DIR] [--readme README.md] [--baseline OTHER.json]

It prints the table, worst ratio first; ``--out`` writes it as report.md, with ratio.png and
roofline.png; ``--readme`` puts it between the marks ``<!-- speed -->`` and ``<!-- /speed -->`` of a
page. A ratio is the time of the best other library over fastrnn's: above 1 fastrnn is the fastest.

``--baseline`` compares with another run instead. Machines and their moods differ, so times are
divided by those of torch.nn in the same run. The exit code is 1 if fastrnn became slower by more
than 10% anywhere.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fastrnn.tools.benchmark.peers import FASTRNN, LIBRARIES, TORCH

REGRESSION = 1.10
MARKS = ("<!-- speed -->", "<!-- /speed -->")
COLORS = {"rnn": "tab:blue", "gru": "tab:green", "lstm": "tab:red"}
MARKERS = {"forward": "o", "training": "^"}


@dataclass
class Row:
    """A task as all libraries did it.

    Args:
        facts: what the benchmark says of the task (``extra_info``).
        seconds: the median call of each library.
    """

    facts: dict[str, Any]
    seconds: dict[str, float] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return f"{self.facts['cell']} {self.facts['mode']} {self.facts['label']}"

    @property
    def ratio(self) -> float:
        """The best peer's time over fastrnn's."""
        others = [value for name, value in self.seconds.items() if name != FASTRNN.name]
        return min(others) / self.seconds[FASTRNN.name]

    @property
    def gflops(self) -> float:
        return float(self.facts["flops"]) / self.seconds[FASTRNN.name] * 1e-9


@dataclass
class Run:
    """A file of pytest-benchmark.

    Args:
        rows: the worst ratio first; only tasks that fastrnn and a peer did.
        machine: where it ran, and the versions.
        commit: short, with a + for changes that are not committed.
        date: of the measurement.
    """

    rows: list[Row]
    machine: dict[str, Any]
    commit: str
    date: str

    @property
    def fma_peak(self) -> float:
        """The largest that was measured, GFLOP/s."""
        return max(float(row.facts["fma_peak"]) for row in self.rows)

    def of_peak(self, row: Row) -> float:
        """How much of it fastrnn reached, in per cent."""
        return 100 * row.gflops / self.fma_peak

    @property
    def libraries(self) -> list[str]:
        """The names of all that took part, fastrnn first."""
        present = {name for row in self.rows for name in row.seconds}
        return [library.name for library in LIBRARIES if library.name in present]

    @property
    def about(self) -> str:
        """Machine, versions and commit in one line."""
        facts = ", ".join(f"{key} {value}" for key, value in self.machine.items())
        return f"{facts}, commit {self.commit}, {self.date}"


def load(path: Path) -> Run:
    """Reads a file.

    Raises:
        SystemExit: it is none of ``pytest bench``.
    """
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        tasks: dict[str, Row] = {}
        for entry in document["benchmarks"]:
            facts = entry["extra_info"]
            row = tasks.setdefault(entry["group"], Row(facts))
            row.seconds[facts["library"]] = entry["stats"]["median"]
        rows = [
            row for row in tasks.values() if FASTRNN.name in row.seconds and len(row.seconds) > 1
        ]
        commit = document["commit_info"]
        return Run(
            sorted(rows, key=lambda row: row.ratio),
            rows[0].facts["machine"],
            commit.get("id", "unknown")[:10] + ("+" if commit.get("dirty") else ""),
            document["datetime"][:10],
        )
    except OSError as error:
        raise SystemExit(f"{path}: cannot be read ({error.strerror})") from error
    except (ValueError, KeyError, IndexError, TypeError):
        raise SystemExit(f"{path}: is no result of pytest bench --benchmark-json FILE") from None


# -- the table ------------------------------------------------------------------------------------


def table(run: Run) -> str:
    """Markdown: what was measured where, a line a task, and the means."""
    titles = [library.title for library in LIBRARIES if library.name in run.libraries]
    header = ["cell", "mode", "point", *(f"{title} ms" for title in titles)]
    header += ["ratio", "GFLOP/s", "% of peak"]
    lines = [
        f"Measured on one machine: {run.about}. The ratio is the time of the best other library "
        "over fastrnn's (above 1 fastrnn is the fastest), of medians that were measured in turns; "
        "training is forward and backward; the peak is that of multiply-adds alone, "
        f"{run.fma_peak:.0f} GFLOP/s in this run.",
        "",
        _line(header),
        "|---|---|---|" + "--:|" * (len(header) - 3),
    ]
    for row in run.rows:
        facts = row.facts
        times = [
            f"{row.seconds[name] * 1e3:.3f}" if name in row.seconds else ""
            for name in run.libraries
        ]
        figures = [f"{row.ratio:.2f}", f"{row.gflops:.1f}", f"{run.of_peak(row):.0f}"]
        lines.append(_line([facts["cell"], facts["mode"], facts["label"], *times, *figures]))
    return "\n".join([*lines, "", *means(run.rows)]) + "\n"


def means(rows: Sequence[Row]) -> list[str]:
    """Markdown: lowest ratio and geometric mean, a line a cell and mode."""
    kinds = dict.fromkeys((row.facts["mode"], row.facts["cell"]) for row in sorted(rows, key=_kind))
    lines = [
        _line(["cell", "mode", "points", "lowest ratio", "geometric mean"]),
        "|---|---|--:|--:|--:|",
    ]
    for mode, cell in kinds:
        ratios = [row.ratio for row in rows if _kind(row) == (mode, cell)]
        lowest, mean = min(ratios), geometric_mean(ratios)
        lines.append(_line([cell, mode, str(len(ratios)), f"{lowest:.2f}", f"{mean:.2f}"]))
    return lines


def geometric_mean(values: Iterable[float]) -> float:
    return math.exp(statistics.fmean(map(math.log, values)))


def _kind(row: Row) -> tuple[str, str]:
    return row.facts["mode"], row.facts["cell"]


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def insert(page: str, text: str) -> str:
    """A page with a text between its marks.

    Raises:
        SystemExit: the page does not have the marks, once and in their order.
    """
    begin, end = MARKS
    pattern = re.compile(f"{re.escape(begin)}.*?{re.escape(end)}", re.DOTALL)
    if len(pattern.findall(page)) != 1:
        raise SystemExit(f"--readme: the page does not have {begin} and {end} once")
    return pattern.sub(lambda _: f"{begin}\n{text}{end}", page)


# -- the pictures ---------------------------------------------------------------------------------


def draw(run: Run, folder: Path) -> None:
    """Writes ratio.png and roofline.png."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    labels = list(dict.fromkeys(row.facts["label"] for row in sorted(run.rows, key=_size)))
    figure = Figure(figsize=(9, 2 + 0.22 * len(labels)), layout="constrained")
    axes = figure.subplots()
    _scatter(axes, run.rows, [(row.ratio, labels.index(row.facts["label"])) for row in run.rows])
    axes.axvline(1, color="black", linewidth=1)
    axes.set_xscale("log")
    axes.set_xlabel("ratio to the best other library (above 1: fastrnn is the fastest)")
    axes.set_yticks(range(len(labels)), labels, fontsize=7)
    _finish(axes, figure, run, "fastrnn and the best of its peers")
    FigureCanvasAgg(figure).print_png(folder / "ratio.png")

    figure = Figure(figsize=(9, 5.5), layout="constrained")
    axes = figure.subplots()
    _scatter(axes, run.rows, [(row.facts["intensity"], run.of_peak(row)) for row in run.rows])
    axes.axhline(100, color="black", linewidth=1)
    axes.set_xscale("log")
    axes.set_ylim(bottom=0)
    axes.set_xlabel("arithmetic intensity of a forward step (FLOP per byte of weights, x and h)")
    axes.set_ylabel("% of the peak on multiply-adds")
    _finish(axes, figure, run, "How much of the machine fastrnn uses")
    FigureCanvasAgg(figure).print_png(folder / "roofline.png")


def _size(row: Row) -> tuple[int, int, int]:
    point = row.facts["point"]
    return point["batch"], point["hidden_size"], point["steps"]


def _scatter(axes: Any, rows: Sequence[Row], places: Sequence[tuple[float, float]]) -> None:
    for mode, cell in dict.fromkeys(map(_kind, sorted(rows, key=_kind))):
        chosen = [
            place for row, place in zip(rows, places, strict=True) if _kind(row) == (mode, cell)
        ]
        axes.scatter(
            *zip(*chosen, strict=True),
            color=COLORS[cell],
            marker=MARKERS[mode],
            alpha=0.7,
            label=f"{cell} {mode}",
        )


def _finish(axes: Any, figure: Any, run: Run, title: str) -> None:
    axes.set_title(title)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    figure.supxlabel(run.about, fontsize=6)


# -- against another run --------------------------------------------------------------------------


def changes(run: Run, baseline: Run) -> list[tuple[float, str, float, float]]:
    """How fastrnn's time in units of torch.nn's changed, the largest increase first.

    Returns:
        For each task of both runs: now over then, its name, then, now.
    """
    then = {row.name: _of_torch(row) for row in baseline.rows if TORCH.name in row.seconds}
    found = [
        (_of_torch(row) / then[row.name], row.name, then[row.name], _of_torch(row))
        for row in run.rows
        if row.name in then and TORCH.name in row.seconds
    ]
    return sorted(found, reverse=True)


def _of_torch(row: Row) -> float:
    return row.seconds[FASTRNN.name] / row.seconds[TORCH.name]


def compare(run: Run, baseline: Run) -> int:
    """Prints the changes and returns the exit code."""
    found = changes(run, baseline)
    if not found:
        raise SystemExit("--baseline: the two runs have no task in common")
    slower = sum(change > REGRESSION for change, *_ in found)
    print(f"now:  {run.about}\nthen: {baseline.about}\n")
    print("fastrnn's time / torch.nn's in the same run, the largest increase first:")
    print(f"{'task':<48} {'then':>7} {'now':>7} {'change':>7}")
    for change, name, before, now in found:
        mark = "  slower" if change > REGRESSION else ""
        print(f"{name:<48} {before:>7.3f} {now:>7.3f} {change - 1:>+7.0%}{mark}")
    mean = geometric_mean(change for change, *_ in found)
    print(f"\n{len(found)} tasks, {slower} slower by more than 10%, on average {mean - 1:+.1%}")
    return 1 if slower else 0


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("result", type=Path, metavar="RESULT.json")
    parser.add_argument("--out", type=Path, metavar="DIR", help="for report.md and the pictures")
    parser.add_argument("--readme", type=Path, metavar="FILE", help="a page to put the table into")
    parser.add_argument("--baseline", type=Path, metavar="OTHER.json", help="a run to compare with")
    options = parser.parse_args(arguments)
    run = load(options.result)
    if options.baseline:
        return compare(run, load(options.baseline))
    text = table(run)
    print(text, end="")
    if options.out:
        options.out.mkdir(parents=True, exist_ok=True)
        (options.out / "report.md").write_text(f"# Speed\n\n{text}", encoding="utf-8")
        draw(run, options.out)
    if options.readme:
        page = insert(options.readme.read_text(encoding="utf-8"), text)
        options.readme.write_text(page, encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

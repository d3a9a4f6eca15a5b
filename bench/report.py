"""Makes a report from the file that ``pytest bench --benchmark-json RESULT.json`` writes.

    python bench/report.py RESULT.json [--out DIR] [--save] [--readme README.md]
                           [--baseline OTHER.json]

Prints a summary and a table of all tasks, lowest ratio first. ``--out`` writes both as report.md,
together with ratio.png and roofline.png. ``--save`` writes RESULT.json (only what a report reads)
and RESULT.md to bench/results/MACHINE, the folder of the machine that was measured. ``--readme``
writes the summary between the marks ``<!-- speed -->`` and ``<!-- /speed -->`` of a page.

A task is a cell, a mode, a shape, a dtype and a number of threads. The tables have columns for the
dtype and the threads if the run has several; there is then a pair of pictures for each combination.
A ratio is the time of another library divided by fastrnn's time: above 1, fastrnn is faster. The
peers of fastrnn are all other libraries that were measured; the best peer of a task is the fastest
of them.

``--baseline`` compares the tasks that two runs have in common instead. Machines differ and their
speed varies, so every time is first divided by torch.nn's time in the same run. The exit code is 1
if fastrnn became more than 10% slower in any task.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from fastrnn.tools.benchmark.peers import FASTRNN, LIBRARIES, TORCH
from fastrnn.tools.benchmark.shapes import DTYPES, axes_label

RESULTS = Path(__file__).resolve().parent / "results"
REGRESSION = 1.10
STATISTICS = ("min", "q1", "median", "q3", "rounds")
MARKS = ("<!-- speed -->", "<!-- /speed -->")
AXES = ("dtype", "threads")
TITLES = {"rnn": "RNN", "gru": "GRU", "lstm": "LSTM", "forward": "inference"}
COLORS = {"rnn": "tab:blue", "gru": "tab:green", "lstm": "tab:red"}
MARKERS = {"forward": "o", "training": "^"}


@dataclass
class Row:
    """One task, measured with every library that supports it.

    Args:
        facts: description of the task (``extra_info`` of the benchmark).
        seconds: median time per call, by library.
    """

    facts: dict[str, Any]
    seconds: dict[str, float] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """Name of the task in messages; equal tasks of two runs have equal names."""
        return f"{self.facts['cell']} {self.facts['mode']} {self.facts['label']} {self.axes}"

    @property
    def dtype(self) -> str:
        """The dtype. In older files it is a fact of the machine."""
        return str(self.facts.get("dtype", self.facts["machine"]["dtype"]))

    @property
    def threads(self) -> int:
        """Number of threads. In older files it is a fact of the machine."""
        return int(self.facts.get("threads", self.facts["machine"]["threads"]))

    @property
    def axes(self) -> str:
        """The dtype and the threads, such as ``int8 2 threads``."""
        return axes_label(self.dtype, self.threads)

    @property
    def ratio(self) -> float:
        """Time of the best peer divided by fastrnn's."""
        others = [value for name, value in self.seconds.items() if name != FASTRNN.name]
        return min(others) / self.seconds[FASTRNN.name]

    @property
    def torch_ratio(self) -> float | None:
        """Time of torch.nn divided by fastrnn's, None if torch.nn was not measured."""
        torch = self.seconds.get(TORCH.name)
        return None if torch is None else torch / self.seconds[FASTRNN.name]

    @property
    def has_other_peers(self) -> bool:
        """Whether a library besides fastrnn and torch.nn was measured."""
        return not self.seconds.keys() <= {FASTRNN.name, TORCH.name}

    @property
    def gflops(self) -> float:
        return float(self.facts["flops"]) / self.seconds[FASTRNN.name] * 1e-9


@dataclass
class Run:
    """The contents of a file that pytest-benchmark wrote.

    Args:
        rows: tasks that fastrnn and at least one peer ran, lowest ratio first.
        machine: the machine and the versions of the libraries.
        machine_name: name of the machine's folder of results, empty in older files.
        commit: short hash, followed by + if there were uncommitted changes.
        date: day of the measurement.
    """

    rows: list[Row]
    machine: dict[str, Any]
    machine_name: str
    commit: str
    date: str

    @property
    def dtypes(self) -> list[str]:
        """The measured dtypes, float32 first."""
        return sorted({row.dtype for row in self.rows}, key=DTYPES.index)

    @property
    def threads(self) -> list[int]:
        """The measured numbers of threads."""
        return sorted({row.threads for row in self.rows})

    @property
    def has_axes(self) -> bool:
        """Whether there are several dtypes or numbers of threads."""
        return len(self.dtypes) * len(self.threads) > 1

    def fma_peak(self, threads: int) -> float:
        """Highest throughput of float32 multiply-adds that was measured, in GFLOP/s."""
        return max(float(row.facts["fma_peak"]) for row in self.rows if row.threads == threads)

    def of_peak(self, row: Row) -> float:
        """Throughput of fastrnn in percent of the peak with as many threads."""
        return 100 * row.gflops / self.fma_peak(row.threads)

    @property
    def libraries(self) -> list[str]:
        """Names of the measured libraries, fastrnn first."""
        present = {name for row in self.rows for name in row.seconds}
        return [library.name for library in LIBRARIES if library.name in present]

    @property
    def about(self) -> str:
        """Machine, versions and commit in one line."""
        axes = {"threads": self.threads, "dtype": self.dtypes}
        machine = self.machine | {key: "/".join(map(str, values)) for key, values in axes.items()}
        facts = ", ".join(f"{key} {value}" for key, value in machine.items())
        return f"{facts}, commit {self.commit}, {self.date}"


def load(path: Path) -> Run:
    """Reads the result of a run.

    Raises:
        SystemExit: the file was not written by ``pytest bench``.
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
            rows[0].facts.get("machine_name", ""),
            commit.get("id", "unknown")[:10] + ("+" if commit.get("dirty") else ""),
            document["datetime"][:10],
        )
    except OSError as error:
        raise SystemExit(f"{path}: cannot be read ({error.strerror})") from error
    except (ValueError, KeyError, IndexError, TypeError):
        raise SystemExit(
            f"{path}: must be a result of pytest bench --benchmark-json FILE"
        ) from None


# -- the tables -----------------------------------------------------------------------------------


def summary(run: Run) -> str:
    """Markdown: the machine, and the mean and lowest ratio per cell, mode, dtype and threads."""
    text = (
        f"Measured on one machine: {run.about}. Each figure is the other library's median time "
        "divided by fastrnn's, from interleaved calls; above 1, fastrnn is faster. Means are "
        "geometric. Training is forward and backward."
    )
    if "int8" in run.dtypes:
        text += " torch.nn has no int8 weights and runs in float32 there."
    return text + "\n\n" + "\n".join(means(run)) + "\n"


def table(run: Run) -> str:
    """Markdown: the summary, then one line per task, lowest ratio first."""
    titles = [library.title for library in LIBRARIES if library.name in run.libraries]
    names = ["cell", "mode", "shape", *AXES * run.has_axes]
    header = [*names, *(f"{title} ms" for title in titles), "ratio", "GFLOP/s", "% of peak"]
    peaks = ", ".join(
        f"{run.fma_peak(threads):.0f} GFLOP/s with {threads} thread{'s' if threads > 1 else ''}"
        for threads in run.threads
    )
    lines = [
        "## All tasks, lowest ratio first",
        "",
        "The ratio is the best peer's time divided by fastrnn's. The peak is the machine's "
        f"throughput on float32 multiply-adds alone, in this run {peaks}.",
        "",
        _line(header),
        "|" + "---|" * len(names) + "--:|" * (len(header) - len(names)),
    ]
    for row in run.rows:
        facts = row.facts
        times = [
            f"{row.seconds[name] * 1e3:.3f}" if name in row.seconds else ""
            for name in run.libraries
        ]
        figures = [f"{row.ratio:.2f}", f"{row.gflops:.1f}", f"{run.of_peak(row):.0f}"]
        texts = [facts["cell"], facts["mode"], facts["label"], *_axes(run, row)]
        lines.append(_line([*texts, *times, *figures]))
    return summary(run) + "\n" + "\n".join(lines) + "\n"


def means(run: Run) -> list[str]:
    """Markdown: geometric mean and lowest ratio against torch.nn and against the best peer.

    There is a line for each cell, mode, dtype and number of threads. The columns of the best peer
    are empty where torch.nn was the only peer.
    """
    names = ["cell", "mode", *AXES * run.has_axes]
    lines = [
        _line([*names, "shapes", *_columns("torch.nn"), *_columns("best peer")]),
        "|" + "---|" * len(names) + "--:|" * 5,
    ]
    for (mode, cell, *_), own in _by_kind(run.rows).items():
        figures = _mean_and_lowest(
            [(row.torch_ratio, row.facts["label"]) for row in own if row.torch_ratio is not None]
        )
        if any(row.has_other_peers for row in own):
            figures += _mean_and_lowest([(row.ratio, row.facts["label"]) for row in own])
        else:
            figures += ["", ""]
        texts = [TITLES.get(cell, cell), TITLES.get(mode, mode), *_axes(run, own[0])]
        lines.append(_line([*texts, str(len(own)), *figures]))
    return lines


def _axes(run: Run, row: Row) -> list[str]:
    """Cells of a table's columns `AXES`, which a run of one dtype and thread number lacks."""
    return [row.dtype, str(row.threads)] if run.has_axes else []


def _columns(peer: str) -> list[str]:
    return [f"vs {peer}: mean", f"vs {peer}: lowest"]


def _mean_and_lowest(ratios: Sequence[tuple[float, str]]) -> list[str]:
    if not ratios:
        return ["", ""]
    lowest, label = min(ratios)
    return [f"{geometric_mean(ratio for ratio, _ in ratios):.2f}", f"{lowest:.2f} ({label})"]


def geometric_mean(values: Iterable[float]) -> float:
    return math.exp(statistics.fmean(map(math.log, values)))


def _by_kind(rows: Iterable[Row]) -> dict[tuple[str, str, int, int], list[Row]]:
    """Groups rows by mode, cell, dtype (its place in `DTYPES`) and threads, in this order."""
    found: dict[tuple[str, str, int, int], list[Row]] = {}
    for row in rows:
        dtype = DTYPES.index(row.dtype)
        key = (row.facts["mode"], row.facts["cell"], dtype, row.threads)
        found.setdefault(key, []).append(row)
    return dict(sorted(found.items()))


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def insert(page: str, text: str) -> str:
    """Replaces the text between the marks of a page.

    Raises:
        SystemExit: the page must have each mark exactly once, in this order.
    """
    begin, end = MARKS
    pattern = re.compile(f"{re.escape(begin)}.*?{re.escape(end)}", re.DOTALL)
    if len(pattern.findall(page)) != 1:
        raise SystemExit(f"--readme: the page must have {begin} and {end} exactly once")
    return pattern.sub(lambda _: f"{begin}\n{text}{end}", page)


# -- the pictures ---------------------------------------------------------------------------------


def draw(run: Run, folder: Path) -> None:
    """Writes ratio.png and roofline.png, with several dtypes or threads a pair for each."""
    for axes in dict.fromkeys(row.axes for row in run.rows):
        rows = [row for row in run.rows if row.axes == axes]
        one = replace(run, rows=rows)
        suffix = f"-{axes.replace(' ', '-')}" if run.has_axes else ""
        _draw_ratios(one, folder / f"ratio{suffix}.png")
        _draw_roofline(one, folder / f"roofline{suffix}.png")


def _draw_ratios(run: Run, path: Path) -> None:
    labels = list(dict.fromkeys(row.facts["label"] for row in sorted(run.rows, key=_size)))
    figure, axes = _figure(2 + 0.22 * len(labels))
    _scatter(axes, run.rows, lambda row: (row.ratio, labels.index(row.facts["label"])))
    axes.axvline(1, color="black", linewidth=1)
    axes.set_xscale("log")
    axes.set_xlabel("best peer's time divided by fastrnn's (above 1: fastrnn is the fastest)")
    axes.set_yticks(range(len(labels)), labels, fontsize=7)
    _finish(axes, figure, run, "fastrnn compared with its best peer", path)


def _draw_roofline(run: Run, path: Path) -> None:
    figure, axes = _figure(5.5)
    _scatter(axes, run.rows, lambda row: (row.facts["intensity"], run.of_peak(row)))
    axes.axhline(100, color="black", linewidth=1)
    axes.set_xscale("log")
    axes.set_ylim(bottom=0)
    axes.set_xlabel("arithmetic intensity of a forward step (FLOP per byte of weights, x and h)")
    axes.set_ylabel("% of the multiply-add peak in float32")
    _finish(axes, figure, run, "Share of the machine's peak that fastrnn uses", path)


def _figure(height: float) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, height), layout="constrained")
    return figure, figure.subplots()


def _size(row: Row) -> tuple[int, int, int]:
    point = row.facts["point"]
    return point["batch"], point["hidden_size"], point["steps"]


def _scatter(axes: Any, rows: Iterable[Row], place: Callable[[Row], tuple[float, float]]) -> None:
    for (mode, cell, *_), own in _by_kind(rows).items():
        axes.scatter(
            *zip(*map(place, own), strict=True),
            color=COLORS[cell],
            marker=MARKERS[mode],
            alpha=0.7,
            label=f"{cell} {mode}",
        )


def _finish(axes: Any, figure: Any, run: Run, title: str, path: Path) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    axes.set_title(title)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    figure.supxlabel(run.about, fontsize=6)
    FigureCanvasAgg(figure).print_png(path)


# -- comparison of two runs -----------------------------------------------------------------------


def changes(run: Run, baseline: Run) -> list[tuple[float, str, float, float]]:
    """Changes of fastrnn's time divided by torch.nn's, largest increase first.

    Returns:
        For each task of both runs: new value / old value, task name, old value, new value.
    """
    old = {row.name: 1 / row.torch_ratio for row in baseline.rows if row.torch_ratio is not None}
    found = [
        (1 / (row.torch_ratio * old[row.name]), row.name, old[row.name], 1 / row.torch_ratio)
        for row in run.rows
        if row.name in old and row.torch_ratio is not None
    ]
    return sorted(found, reverse=True)


def compare(run: Run, baseline: Run) -> int:
    """Prints the changes and returns the exit code."""
    found = changes(run, baseline)
    if not found:
        raise SystemExit("--baseline: the two runs must have a task in common")
    slower = sum(change > REGRESSION for change, *_ in found)
    print(f"new: {run.about}\nold: {baseline.about}\n")
    print("fastrnn's time divided by torch.nn's in the same run, largest increase first:")
    print(f"{'task':<62} {'old':>7} {'new':>7} {'change':>7}")
    for change, name, before, after in found:
        mark = "  slower" if change > REGRESSION else ""
        print(f"{name:<62} {before:>7.3f} {after:>7.3f} {change - 1:>+7.0%}{mark}")
    mean = geometric_mean(change for change, *_ in found)
    print(f"\n{len(found)} tasks, {slower} slower by more than 10%, on average {mean - 1:+.1%}")
    return 1 if slower else 0


# -- the folder of a machine ----------------------------------------------------------------------


def save(run: Run, path: Path, results: Path = RESULTS) -> Path:
    """Writes the run and its tables to the folder of its machine, which it returns.

    Args:
        run: the run.
        path: file of the run. Its name becomes that of the written files.
        results: folder of the machines' folders.
    """
    if not run.machine_name:
        raise SystemExit(f"--save: {path} must hold the name of its machine; use --out instead")
    document = json.loads(path.read_text(encoding="utf-8"))
    known: set[str] = set()
    entries = []
    for entry in document["benchmarks"]:
        facts, stats = entry["extra_info"], entry["stats"]
        if entry["group"] in known:  # `load` reads the facts of a task from its first entry
            facts = {key: facts[key] for key in ("library", "error")}
        known.add(entry["group"])
        stats = {key: stats[key] for key in STATISTICS}
        entries.append({"group": entry["group"], "extra_info": facts, "stats": stats})
    slim = {
        "commit_info": {key: document["commit_info"].get(key) for key in ("id", "dirty")},
        "datetime": document["datetime"],
        "benchmarks": entries,
    }
    folder = results / run.machine_name
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{path.stem}.json").write_text(json.dumps(slim) + "\n", encoding="utf-8")
    (folder / f"{path.stem}.md").write_text(f"# Speed\n\n{table(run)}", encoding="utf-8")
    return folder


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("result", type=Path, metavar="RESULT.json")
    parser.add_argument(
        "--out", type=Path, metavar="DIR", help="folder for report.md and the pictures"
    )
    parser.add_argument(
        "--save", action="store_true", help="write to bench/results, to the machine's folder"
    )
    parser.add_argument("--readme", type=Path, metavar="FILE", help="page that gets the summary")
    parser.add_argument(
        "--baseline", type=Path, metavar="OTHER.json", help="earlier run to compare with"
    )
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
    if options.save:
        print(f"\nsaved to {save(run, options.result)}")
    if options.readme:
        page = insert(options.readme.read_text(encoding="utf-8"), summary(run))
        options.readme.write_text(page, encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

"""``bench/``: grid, replaying clock, report, sweeps, derivatives, compile time."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("matplotlib")

import compile_time
import differentiation
import report
import sweep
from grid import GRID, SHORT, chosen_points, tasks

from fastrnn.tools.benchmark.shapes import CELLS, DTYPES, MODES, Shape

ROOT = Path(__file__).resolve().parents[2]
README, RESULTS = ROOT / "README.md", ROOT / "bench" / "results" / "zen4-2-cores"
POINT = Shape("latency", 100, 1, 64, 64)


def write_run(
    path: Path,
    *tasks: tuple[str, str, Shape, dict[str, float]],
    axes: Sequence[tuple[str, int]] = (),
) -> Path:
    """Writes a file like pytest-benchmark's: cell, mode, shape and milliseconds per library.

    Args:
        axes: dtypes and numbers of threads that all tasks run with. Without any, the file is like
            those of earlier versions, which had one of each, in the facts of the machine.
    """
    entries = [
        {
            "group": " ".join([cell, mode, point.label, *map(str, pair)]),
            "stats": {
                "min": 0.0,
                "q1": 0.0,
                "median": ms * 1e-3 * (pair[1] if pair else 1),
                "q3": 0.0,
                "rounds": 9,
                "ops": 1.0,
            },
            "extra_info": {
                "library": library,
                "cell": cell,
                "mode": mode,
                "label": point.label,
                "point": asdict(point),
                "flops": point.flops(cell, mode),
                "intensity": point.intensity(cell),
                "error": 0.0,
                "fma_peak": 100.0 * (pair[1] if pair else 1),
                "machine": {"cpu": "a machine", "threads": 2, "dtype": "float32"},
                **(
                    {"dtype": pair[0], "threads": pair[1], "machine_name": "a-machine"}
                    if pair
                    else {}
                ),
            },
        }
        for pair in axes or [()]
        for cell, mode, point, times in tasks
        for library, ms in times.items()
    ]
    document = {
        "benchmarks": entries,
        "commit_info": {"id": "0123456789abcdef", "dirty": True},
        "datetime": "2030-01-02T03:04:05",
        "machine_info": {"node": "the name of a host"},
    }
    path.write_text(json.dumps(document))
    return path


@pytest.fixture
def result(tmp_path: Path) -> Path:
    return write_run(
        tmp_path / "result.json",
        ("rnn", "forward", POINT, {"fastrnn": 1, "torch": 9, "onnxruntime": 4}),
        ("gru", "forward", POINT, {"fastrnn": 2, "torch": 1}),
        ("gru", "training", POINT, {"fastrnn": 1, "torch": 3}),
        ("gru", "forward", Shape("", 9, 1, 8, 8), {"fastrnn": 1, "torch": 2}),
    )


def test_grid_is_selected_by_block() -> None:
    assert chosen_points("short") == SHORT
    assert chosen_points("all") == GRID
    assert len(set(GRID)) == len(GRID)
    assert {point.block for point in chosen_points("overhead")} == {"overhead"}
    with pytest.raises(
        ValueError, match=r"--points must be short, all or a block of shapes \(.*\), got 'none'"
    ):
        chosen_points("none")


def test_tasks_are_all_supported_combinations() -> None:
    layer, cell = POINT, Shape("overhead", 1, 1, 8, 8, single=True)
    found = tasks([layer, cell], ["lstm", "lstm"], MODES, DTYPES, [1, 2])
    assert len(found) == len(set(found)) == 2 * (2 * 2 * 2 + 1)
    assert [task.threads for task in found] == [1] * 9 + [2] * 9
    assert [(task.shape, task.mode) for task in found if task.dtype == "int8"] == [
        (layer, "forward")
    ] * 2
    default = tasks(SHORT, CELLS, MODES, ["float32"], [2])
    assert len(default) == len(SHORT) * len(CELLS) * len(MODES)


def run_bench(folder: Path, *options: str) -> subprocess.CompletedProcess[str]:
    """Runs ``pytest bench`` in a folder from which the source tree cannot be imported."""
    files = ["-c", str(ROOT / "pyproject.toml"), str(ROOT / "bench")]
    command = [sys.executable, "-m", "pytest", "-q", *files, *options]
    # pytest-benchmark measures nothing in a process that pytest-xdist has started
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_XDIST")}
    return subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, check=False
    )


@pytest.mark.skipif(not README.exists(), reason="needs the source tree")
def test_every_combination_is_measured_and_recorded(tmp_path: Path) -> None:
    pytest.importorskip("pytest_benchmark")
    path = tmp_path / "result.json"
    options = "--points overhead --cells gru --modes forward --seconds 0.001 --threads 1 2 --dtypes"
    result = run_bench(
        tmp_path, *options.split(), *DTYPES, "-k", "T1-B1", f"--benchmark-json={path}"
    )
    assert result.returncode == 0, result.stdout
    records = json.loads(path.read_text())["benchmarks"]
    label = "gru forward T1 B1 I8 H8"
    assert {record["group"] for record in records} == {
        f"{label} {dtype} {threads}" for dtype in DTYPES for threads in ("1 thread", "2 threads")
    }
    for record in records:
        facts = record["extra_info"]
        assert record["name"].startswith(f"test_speed[{record['group'].replace(' ', '-')}-")
        assert facts["dtype"] == facts["machine"]["dtype"]
        assert facts["threads"] == facts["machine"]["threads"]
        assert facts["plan"].get("threads", 1) <= facts["threads"]
    run = report.load(path)
    assert (run.dtypes, run.threads) == (list(DTYPES), [1, 2])
    assert len(run.rows) == 6


@pytest.mark.skipif(not README.exists(), reason="needs the source tree")
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--threads 1 0", "--threads must be above 0, got 0"),
        ("--seconds 0", "--seconds must be above 0, got 0.0"),
        ("--dtypes float64", "argument --dtypes: invalid choice: 'float64'"),
        ("--points none", "--points must be short, all or a block"),
    ],
)
def test_wrong_option_is_reported(tmp_path: Path, options: str, message: str) -> None:
    pytest.importorskip("pytest_benchmark")
    result = run_bench(tmp_path, "--collect-only", *options.split())
    assert result.returncode == 4
    assert message in result.stderr


def test_replay_clock_returns_loaded_times() -> None:
    pytest.importorskip("pytest_benchmark")
    from test_speed import ReplayClock

    clock = ReplayClock()
    clock.load([0.1, 2.5])
    assert [-clock() + clock() for _ in range(2)] == [0.1, 2.5]


def test_report_lists_tasks_by_ratio(
    result: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    readme = tmp_path / "README.md"
    readme.write_text("before\n<!-- speed -->\nold\n<!-- /speed -->\nafter\n")
    assert report.main([str(result), "--out", str(tmp_path / "out"), "--readme", str(readme)]) == 0
    out = capsys.readouterr().out
    assert "a machine, threads 2, dtype float32, commit 0123456789+, 2030-01-02" in out
    lines = out.splitlines()
    start = lines.index("|---|---|---|--:|--:|--:|--:|--:|--:|")
    summary = out[: out.index("\n## All tasks")]
    assert "fastrnn ms | torch.nn ms | ONNX Runtime ms | ratio" in lines[start - 1]
    ratios = [float(line.split("|")[7]) for line in lines[start + 1 : start + 5]]
    assert ratios == [0.5, 2, 3, 4]  # lowest first, against the best peer
    gflops = POINT.flops("rnn", "forward") / 1e-3 * 1e-9
    assert lines[start + 4].endswith(f"| 4.00 | {gflops:.1f} | {gflops:.0f} |")
    assert "| GRU | inference | 2 | 1.00 | 0.50 (T100 B1 I64 H64) |  |  |" in lines
    own, best = "9.00 | 9.00 (T100 B1 I64 H64)", "4.00 | 4.00 (T100 B1 I64 H64)"
    assert f"| RNN | inference | 1 | {own} | {best} |" in lines
    assert readme.read_text() == f"before\n<!-- speed -->\n{summary}<!-- /speed -->\nafter\n"
    assert out in (tmp_path / "out/report.md").read_text()
    for name in ("ratio", "roofline"):
        assert (tmp_path / f"out/{name}.png").read_bytes().startswith(b"\x89PNG")


def test_report_finds_regressions(
    result: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert report.main([str(result), "--baseline", str(result)]) == 0
    assert "4 tasks, 0 slower by more than 10%, on average +0.0%" in capsys.readouterr().out
    # Half the speed, and one task 20% slower relative to torch.
    other = write_run(
        tmp_path / "other.json",
        ("rnn", "forward", POINT, {"fastrnn": 2, "torch": 18}),
        ("gru", "training", POINT, {"fastrnn": 2.4, "torch": 6}),
    )
    assert report.main([str(other), "--baseline", str(result)]) == 1
    out = capsys.readouterr().out
    [first, second] = [line for line in out.splitlines() if POINT.label in line]
    task = "gru training T100 B1 I64 H64 float32 2 threads"
    assert first.split() == f"{task} 0.333 0.400 +20% slower".split()
    assert second.endswith("+0%")
    assert "2 tasks, 1 slower by more than 10%" in out


def test_report_has_a_line_per_dtype_and_threads(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    axes = [("int8", 1), ("bfloat16", 2), ("float32", 2), ("float32", 1)]
    lstm = ("lstm", "forward", POINT, {"fastrnn": 1, "torch": 3, "onnxruntime": 2})
    path = write_run(tmp_path / "all.json", lstm, axes=axes)
    assert report.main([str(path), "--out", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert "threads 1/2, dtype float32/bfloat16/int8" in out
    assert "torch.nn has no int8 weights and runs in float32 there." in out
    lines = out.splitlines()
    figures = "| 1 | 3.00 | 3.00 (T100 B1 I64 H64) | 2.00 | 2.00 (T100 B1 I64 H64) |"
    assert [line for line in lines if line.endswith(figures)] == [
        f"| LSTM | inference | {pair} {figures}"
        for pair in ("float32 | 1", "float32 | 2", "bfloat16 | 2", "int8 | 1")
    ]
    assert "in this run 100 GFLOP/s with 1 thread, 200 GFLOP/s with 2 threads." in out
    gflops = POINT.flops("lstm", "forward") / 2e-3 * 1e-9  # in percent of half the peak as well
    assert any(
        line.startswith("| lstm | forward | T100 B1 I64 H64 | float32 | 2 | 2.000 |")
        and line.endswith(f"| 2.00 | {gflops:.1f} | {gflops / 2:.0f} |")
        for line in lines
    )
    assert sorted(one.name for one in tmp_path.glob("ratio*")) == [
        "ratio-bfloat16-2-threads.png",
        "ratio-float32-1-thread.png",
        "ratio-float32-2-threads.png",
        "ratio-int8-1-thread.png",
    ]


def test_only_equal_tasks_are_compared(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lstm = ("lstm", "forward", POINT, {"fastrnn": 1, "torch": 3})
    old = write_run(tmp_path / "old.json", lstm)  # float32, 2 threads
    axes = [("bfloat16", 2), ("float32", 1), ("float32", 2)]
    new = write_run(tmp_path / "new.json", lstm, axes=axes)
    assert report.main([str(new), "--baseline", str(old)]) == 0
    out = capsys.readouterr().out
    assert "1 tasks, 0 slower" in out
    assert "lstm forward T100 B1 I64 H64 float32 2 threads" in out
    other = write_run(tmp_path / "other.json", lstm, axes=axes[:2])
    with pytest.raises(SystemExit, match="must have a task in common"):
        report.main([str(other), "--baseline", str(old)])


def test_a_run_is_saved_in_the_folder_of_its_machine(tmp_path: Path) -> None:
    lstm = ("lstm", "forward", POINT, {"fastrnn": 1, "torch": 3})
    path = write_run(tmp_path / "all.json", lstm, axes=[("float32", 1), ("int8", 1)])
    run = report.load(path)
    folder = report.save(run, path, tmp_path / "results")
    assert folder == tmp_path / "results" / "a-machine"
    assert report.load(folder / "all.json") == run
    assert (folder / "all.md").read_text() == f"# Speed\n\n{report.table(run)}"
    assert "host" not in (folder / "all.json").read_text()
    old = write_run(tmp_path / "old.json", lstm)
    with pytest.raises(SystemExit, match=r"--save: .*old\.json must hold the name of its machine"):
        report.save(report.load(old), old, tmp_path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "cannot be read (No such file"),
        ("{}", "must be a result of pytest bench"),
        ("[1", "must be a result of pytest bench"),
        ('{"benchmarks": []}', "must be a result of pytest bench"),
    ],
)
def test_invalid_results_file(tmp_path: Path, text: str | None, message: str) -> None:
    path = tmp_path / "x.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(SystemExit, match=r"x\.json: ") as error:
        report.main([str(path)])
    assert message in str(error.value)


def test_a_page_without_marks() -> None:
    with pytest.raises(SystemExit, match="the page must have <!-- speed --> and <!-- /speed"):
        report.insert("nothing", "text")


@pytest.mark.skipif(not RESULTS.exists(), reason="needs the source tree")
def test_committed_pages_match_their_results() -> None:
    runs = [
        path
        for path in RESULTS.parent.glob("*/*.json")
        if path.with_suffix(".md").exists() and "benchmarks" in json.loads(path.read_text())
    ]
    assert {path.stem for path in runs} >= {"grid", "short-list", "short-list-1-thread"}
    for path in runs:
        page = f"# Speed\n\n{report.table(report.load(path))}"
        assert path.with_suffix(".md").read_text() == page, path


@pytest.mark.skipif(not README.exists(), reason="needs the source tree")
def test_the_readme_has_the_summary_of_the_grid() -> None:
    page = README.read_text(encoding="utf-8")
    assert report.insert(page, report.summary(report.load(RESULTS / "grid.json"))) == page


def means(name: str) -> dict[tuple[str, str], list[str]]:
    """Geometric means against torch.nn and the best peer, as the documents print them."""
    found = {}
    for line in report.means(report.load(RESULTS / f"{name}.json"))[2:]:
        cell, mode, _, torch, _, best, _ = (text.strip() for text in line.split("|")[1:-1])
        found[cell, mode] = [torch, best]
    return found


@pytest.mark.skipif(not README.exists(), reason="needs the source tree")
def test_the_tables_of_the_documents_match_the_results() -> None:
    page = (ROOT / "docs" / "performance" / "cpu.md").read_text(encoding="utf-8")
    rows = [[text.strip() for text in line.split("|")[1:-1]] for line in page.splitlines()]
    for kind, figures in means("grid").items():
        assert [*kind, *figures] in rows
    one_thread = means("short-list-1-thread")
    for kind, figures in means("short-list").items():
        assert [*kind, *figures, *one_thread[kind]] in rows


def test_sizes_of_a_sweep() -> None:
    assert sweep.sizes("H", 128, 1) == [*range(1, 301), 511, 512, 513, 1023, 1024, 1025]
    assert sweep.sizes("H", 128, 100) == [1, 101, 201, 511, 512, 513, 1023, 1024, 1025]
    assert sweep.sizes("B", 128, 1) == list(range(1, 41))
    assert sweep.sizes("I", 5, 2) == [1, 3, 5]
    shapes = {axis: sweep.point(axis, 7, 50, 16, 128).label for axis in sweep.AXES}
    assert shapes == {"H": "T50 B16 I7 H7", "B": "T50 B7 I128 H128", "I": "T50 B16 I7 H128"}


def test_spikes_are_found() -> None:
    falling = [100 / size for size in range(1, 50)]
    assert sweep.spikes(falling) == {}
    falling[20] *= 1.3
    found: dict[int, Any] = sweep.spikes(falling)
    assert found.keys() == {20}
    assert found[20] == pytest.approx(1.3, abs=0.02)
    assert sweep.spikes([1.0]) == {}


def test_sweep_writes_results_and_plot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = "--axis I --cell rnn --T 2 --B 1 --H 4 --passes 1 --threads 1 --out".split()
    monkeypatch.setattr("sys.argv", ["sweep.py", *options, str(tmp_path)])
    sweep.main()
    document = json.loads((tmp_path / "sweep-I-rnn-forward.json").read_text())
    assert [result["size"] for result in document["results"]] == [1, 2, 3, 4]
    assert all(result["ms"] > 0 for result in document["results"])
    assert (tmp_path / "sweep-I-rnn-forward.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("cell", differentiation.CELLS)
def test_every_derivative_is_measured(cell: str) -> None:
    measured = differentiation.ratios(cell, 2, 3, 2, seconds=0.0)
    assert measured.keys() == differentiation.RATIOS.keys()
    assert all(ratio > 0 for ratio in measured.values())


def test_compile_time_stops_at_its_limit() -> None:
    assert compile_time.fastest("fastrnn", 3, False, limit=0.01, repeat=1) is None


@pytest.mark.slow
def test_compile_time_is_measured() -> None:
    static, dynamic = (
        compile_time.measure_apart("fastrnn", 3, dynamic, limit=300) for dynamic in (False, True)
    )
    assert static.keys() == dynamic.keys() == set(compile_time.COLUMNS)
    assert static["seconds"] == pytest.approx(static["forward"] + static["backward"])
    assert static["nodes"] > 0

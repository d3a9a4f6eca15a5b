"""``bench/cuda_*.py`` on the CPU: everything except GPU times and the real sanitizer."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import cuda_grid
import cuda_report
import cuda_sanitize
import cuda_speed
import pytest
import torch
from cuda_grid import BLOCKS, POINTS, GpuTask, tasks

from fastrnn.tools.benchmark.shapes import CELLS, MODES

RESULTS = Path(__file__).resolve().parents[2] / "bench" / "results" / "h200"


@pytest.fixture(autouse=True)
def own_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Restores FASTRNN_SCHEDULE, which the benchmark sets."""
    monkeypatch.setenv("FASTRNN_SCHEDULE", "auto")


def test_grid_has_every_block_early() -> None:
    chosen = tasks(POINTS)
    labels = [task.label for task in chosen]
    assert len(set(labels)) == len(labels)
    ways = {(task.cell, task.dtype, task.mode) for task in chosen}
    assert len(ways) == len(CELLS) * len(cuda_grid.DTYPES) * len(MODES)
    first = chosen[: len(ways) * len(BLOCKS)]
    assert {task.at.point.block for task in chosen[: len(BLOCKS)]} == set(BLOCKS)
    assert {(task.at.point.block, task.cell, task.dtype, task.mode) for task in first} == {
        (block, *way) for block in BLOCKS for way in ways
    }
    assert {task.cell for task in chosen if task.at.point.hidden_size == 2816} == {"gru"}
    assert {task.cell for task in chosen if task.at.point.proj_size > 0} == {"lstm"}


def speed(*arguments: object) -> int:
    chosen = "--device cpu --seconds 0.0001 --cells lstm gru --dtypes float32 tf32 float16"
    return cuda_speed.main([*chosen.split(), *map(str, arguments)])


def test_speed_measures_and_reports_all_tasks(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, page = tmp_path / "gpu.json", tmp_path / "gpu.md"
    shapes = ["--blocks", "batch-1", "packed", "--commit", "abc"]
    assert speed(*shapes, "--json", path, "--report", page) == 0
    out = capsys.readouterr().out
    assert "36 tasks measured, 0 of 36 left" in out
    document = json.loads(path.read_text())
    assert document["machine"]["commit"] == "abc"
    assert document["machine"]["torch"] == torch.__version__
    assert "under_way" not in document
    lines = document["results"]
    assert {line["block"] for line in lines} == {"batch-1", "packed"}
    assert {line["graph"] for line in lines} == {False, True}
    for line in lines:
        assert line["rejected"] == {}
        assert line["seconds"].keys() == {"stepwise", "persistent", "auto", "torch"}
        rounds = {len(times) for times in line["rounds"].values()}
        assert rounds in ({3}, {4}, {5})
        assert all(error < 0.1 for error in line["errors"].values())
        assert [plan["schedule"] for plan in line["plan"]] == ["stepwise"] * len(line["plan"])
        assert len(line["plan"]) == (2 if line["mode"] == "training" else 1)

    text = page.read_text()
    assert "commit abc" in text
    assert "36 of 36 tasks have a ratio." in text
    rows = [row for row in text.splitlines() if "| T3 B2 " in row or "| T3 B1 " in row]
    ratios = [float(row.split("|")[-3]) for row in rows]
    assert len(ratios) == 36
    assert ratios == sorted(ratios)
    assert "| all | gru | forward | float16 | 3 |" in text
    page.unlink()
    assert speed("--budget", 0, "--json", path, "--report", page) == 0
    assert page.read_text() == text


@pytest.mark.skipif(not RESULTS.exists(), reason="needs the source tree")
def test_the_committed_page_matches_its_results() -> None:
    document = json.loads((RESULTS / "cuda-speed.json").read_text())
    assert (RESULTS / "cuda-speed.md").read_text() == cuda_report.report(document)


@pytest.mark.skipif(not RESULTS.exists(), reason="needs the source tree")
def test_the_table_of_the_documents_matches_the_results() -> None:
    page = (RESULTS.parents[2] / "docs" / "performance" / "gpu.md").read_text(encoding="utf-8")
    rows = [[text.strip(" *") for text in line.split("|")[1:-1]] for line in page.splitlines()]
    table = {(row[0], row[1]): row[2:] for row in rows if len(row) == 6}
    ratios: dict[tuple[str, str, str], list[float]] = {}
    for line in json.loads((RESULTS / "cuda-speed.json").read_text())["results"]:
        kind = line["cell"].upper(), {"forward": "inference"}.get(line["mode"], line["mode"])
        ratios.setdefault((*kind, line["dtype"]), []).append(cuda_report.ratio(line))
    for (cell, mode, dtype), values in ratios.items():
        column = ["bfloat16", "tf32", "float16", "float32"].index(dtype)
        figures = f"{cuda_report.geometric_mean(values):.2f} ({min(values):.2f})"
        assert table[cell, mode][column].replace("*", "") == figures


def test_speed_continues_after_a_cut_off(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "gpu.json"
    shapes = ["--blocks", "fastrnns", "--modes", "forward", "--commit", "abc", "--json", path]

    def killed(task: GpuTask, device: str, seconds: float) -> dict[str, Any]:
        if len(json.loads(path.read_text())["results"]) == 2:
            raise KeyboardInterrupt
        return real(task, device, seconds)

    real = cuda_speed.measure
    monkeypatch.setattr(cuda_speed, "measure", killed)
    with pytest.raises(KeyboardInterrupt):
        speed(*shapes)
    under_way = json.loads(path.read_text())["under_way"]
    monkeypatch.setattr(cuda_speed, "measure", real)
    assert speed(*shapes, "--budget", 1000) == 0
    assert "3 tasks measured, 0 of 6 left" in capsys.readouterr().out
    lines = {line["task"]: line for line in json.loads(path.read_text())["results"]}
    assert len(lines) == 6
    assert lines[under_way]["rejected"] == {"all": "the measurement was cut off"}
    text = cuda_report.report(json.loads(path.read_text()))
    assert f"- {under_way}, all: the measurement was cut off" in text
    with pytest.raises(SystemExit, match=r"gpu\.json: was measured on another machine, "):
        speed(*shapes, "--commit", "def")


def test_speed_stops_at_its_budget(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "gpu.json"
    assert speed("--budget", 1e-9, "--json", path) == 0
    assert "0 tasks measured" in capsys.readouterr().out


def test_speed_rejects_results_that_differ(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    real = cuda_speed.Call.results

    def wrong(call: cuda_speed.Call) -> dict[str, torch.Tensor]:
        found = real(call)
        if cuda_speed.os.environ["FASTRNN_SCHEDULE"] == "persistent":
            last = list(found)[-1]
            found[last] = found[last] + 1
        return found

    monkeypatch.setattr(cuda_speed.Call, "results", wrong)
    task = tasks([cuda_grid.tiny(POINTS[0])], ["gru"], ["float32"], ["training"])[0]
    line = cuda_speed.measure(task, "cpu", 1e-4)
    assert line["seconds"].keys() == {"stepwise", "auto", "torch"}
    assert line["rejected"].keys() == {"persistent"}
    assert line["rejected"]["persistent"].startswith("differs from float64: d_bias_hh_l0 by ")
    assert "   persistent: differs from float64" in cuda_speed.row(line)


def test_speed_records_failures(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("CUDA out of memory.\nAnd a long story.")

    monkeypatch.setattr(cuda_speed, "Problem", fail)
    task = tasks([cuda_grid.tiny(POINTS[0])])[0]
    line = cuda_speed.measure_or_record_failure(task, "cpu", 1e-4)
    assert line["rejected"] == {"all": "CUDA out of memory."}
    assert line["task"] == task.label


def test_report_shows_wrong_choices() -> None:
    task = tasks(POINTS)[0]
    line = {
        **cuda_speed.failed_entry(task, ""),
        "flops": 1e9,
        "rejected": {},
        "plan": cuda_speed.plans(task, "auto", {}),
        "seconds": {"stepwise": 1e-3, "persistent": 2e-3, "auto": 2e-3, "torch": 3e-3},
    }
    text = cuda_report.report({"machine": {"device": "a GPU"}, "results": [line]})
    assert "persistent 96x1 of 8 | 1.000 | 2.000 | 2.000 | 3.000 | 1.50 | 0.50 |" in text
    assert f"| {task.label} | persistent 96x1 of 8 | stepwise | 2.00 |" in text


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "cannot be read (No such file"),
        ("{}", "must be a result of cuda_speed.py"),
        ('{"machine": {"commit": ""}, "results": [1', "must be a result of cuda_speed.py"),
        ('{"machine": {"commit": ""}, "results": [1]}', "must be a result of cuda_speed.py"),
    ],
)
def test_invalid_results_file(tmp_path: Path, text: str | None, message: str) -> None:
    path = tmp_path / "x.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(SystemExit, match=r"x\.json: ") as error:
        cuda_speed.main(["--budget", "0", "--json", str(path), "--report", str(tmp_path / "y")])
    assert message in str(error.value)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("program", [cuda_speed, cuda_sanitize], ids=["speed", "sanitize"])
def test_no_gpu(program: Any) -> None:
    with pytest.raises(SystemExit, match=r"^cuda_\w+\.py needs a CUDA device; torch found none"):
        program.main([])


# -- the sanitizer --------------------------------------------------------------------------------


FAKE = """#!{python}
import subprocess, sys
tool = sys.argv[sys.argv.index("--tool") + 1]
program = sys.argv[sys.argv.index({python!r}):]
print("========= COMPUTE-SANITIZER", flush=True)
code = subprocess.call(program)
if tool == "racecheck":
    print("========= Error: Race reported between Write access at 0x10 and Read access at 0x20")
    print("=========     at some line")
    print("========= RACECHECK SUMMARY: 1 hazard displayed (1 error, 0 warnings)")
    code = int(sys.argv[sys.argv.index("--error-exitcode") + 1])
else:
    print("========= ERROR SUMMARY: 0 errors")
sys.exit(code)
"""


@pytest.fixture
def fake(tmp_path: Path) -> str:
    """A sanitizer that always reports a race."""
    path = tmp_path / "sanitizer"
    path.write_text(FAKE.format(python=sys.executable))
    path.chmod(0o755)
    return str(path)


def test_sanitize_reports_findings(
    fake: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    common = ["--device", "cpu", "--sanitizer", fake, "--schedules", "persistent"]
    assert cuda_sanitize.main([*common, "--tools", "memcheck"]) == 0
    [_, line] = capsys.readouterr().out.splitlines()
    words = line.split()
    count = len(cuda_sanitize.LAYERS)
    assert words[:4] == ["memcheck", "persistent", f"{count}/{count}", "0"]
    assert words[5:] == ["clean"]
    assert cuda_sanitize.main([*common, "--tools", "racecheck", "--log", str(tmp_path)]) == 1
    [_, line, finding] = capsys.readouterr().out.splitlines()
    assert line.endswith("FOUND")
    assert finding.strip().startswith("lstm bfloat16 projected: Error: Race reported between")
    assert "RACECHECK SUMMARY" in (tmp_path / "racecheck-persistent.log").read_text()


CLEAN = f"========= COMPUTE-SANITIZER\n{cuda_sanitize.DONE}\n========= ERROR SUMMARY: 0 errors\n"


@pytest.mark.parametrize(
    ("output", "exit_code", "verdict"),
    [
        (CLEAN, 0, "clean"),
        (CLEAN, None, "took too long"),
        (CLEAN, 1, "failed (exit code 1)"),
        (CLEAN, cuda_sanitize.FOUND, "FOUND"),
        (CLEAN.replace("0 errors", "2 errors"), 0, "FOUND"),
        (CLEAN.replace(cuda_sanitize.DONE, ""), 0, "failed (exit code 0)"),
        (CLEAN.replace("ERROR SUMMARY", "nothing"), 0, "no summary"),
    ],
)
def test_sanitizer_output_gives_a_verdict(output: str, exit_code: int | None, verdict: str) -> None:
    assert cuda_sanitize.judge(output, exit_code).verdict == verdict


def test_missing_sanitizer_is_an_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    with pytest.raises(SystemExit, match=r"compute-sanitizer, .*: nowhere/x is not a program\.$"):
        cuda_sanitize.main(["--device", "cpu", "--sanitizer", "nowhere/x"])

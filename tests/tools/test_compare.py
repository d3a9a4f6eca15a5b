"""``fastrnn compare``: operation counts, agreement of the libraries, timing and output."""

from __future__ import annotations

import json
import re
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastrnn import _C
from fastrnn.tools.benchmark import command, measure, timing
from fastrnn.tools.benchmark.agreement import Disagreement, Referee, error
from fastrnn.tools.benchmark.machine_name import machine_name
from fastrnn.tools.benchmark.onnx_model import onnx_model
from fastrnn.tools.benchmark.peers import (
    FASTRNN,
    LIBRARIES,
    TORCH,
    Call,
    Library,
    ModuleCall,
    installed_libraries,
)
from fastrnn.tools.benchmark.shapes import CELLS, MODES, Shape, Task
from fastrnn.tools.benchmark.timing import MIN_ROUNDS, interleaved
from fastrnn.tools.cli import main

TINY = Shape("", 3, 2, 4, 5)
SHAPES = [
    TINY,
    Shape("", 1, 1, 1, 1),
    replace(TINY, layers=2),
    replace(TINY, bidirectional=True),
    replace(TINY, batch=3, layers=2, bidirectional=True),
    replace(TINY, steps=7, batch=4, packed=True),
    replace(TINY, steps=7, batch=4, layers=2, bidirectional=True, packed=True),
]
SINGLE = Shape("", 1, 2, 4, 5, single=True)

pytestmark = pytest.mark.usefixtures("one_thread")


def task(
    cell: str = "lstm", mode: str = "forward", shape: Shape = TINY, dtype: str = "float32"
) -> Task:
    return Task(cell, mode, shape, threads=1, dtype=dtype)


def library(name: str) -> Library:
    [found] = [library for library in LIBRARIES if library.name == name]
    return found


# -- shapes ---------------------------------------------------------------------------------------


def test_flops_count_the_matrix_products() -> None:
    shape = Shape("", 10, 3, 4, 5)
    assert shape.flops("rnn", "forward") == 2 * 10 * 3 * 5 * (4 + 5)
    assert shape.flops("gru", "training") == 3 * 3 * shape.flops("rnn", "forward")
    assert shape.flops("lstm", "forward") == 4 * shape.flops("rnn", "forward")
    stack = replace(shape, layers=2, bidirectional=True)
    assert stack.flops("rnn", "forward") == 2 * 10 * 3 * 2 * (5 * (4 + 5) + 5 * (10 + 5))
    layer = nn.LSTM(4, 5, num_layers=2, bidirectional=True)
    assert stack.weights("lstm") == sum(p.numel() for p in layer.parameters() if p.ndim == 2)


def test_shape_has_lengths_and_label() -> None:
    shape = Shape("", 100, 4, 8, 16, 3, True, True)
    assert shape.lengths == [100, 75, 50, 25]
    assert shape.rows == 250
    assert shape.output_size == 32
    assert shape.label == "T100 B4 I8 H16 x3 bi packed"
    assert Shape("", 2, 5, 1, 1, packed=True).lengths == [2, 2, 1, 1, 1]
    assert SINGLE.label == "cell B2 I4 H5"
    one = Task("gru", "training", TINY, 1)
    assert one.label == "gru training T3 B2 I4 H5"
    assert one.name == "gru training T3 B2 I4 H5 float32 1 thread"
    assert replace(one, threads=2, dtype="int8").name.endswith("H5 int8 2 threads")


def test_intensity_grows_with_the_batch() -> None:
    one, many = (Shape("", 10, batch, 64, 64).intensity("lstm") for batch in (1, 64))
    assert 0.4 < one < 0.5  # two operations per weight of four bytes, and the vectors
    assert 10 * one < many < 32


def test_intensity_grows_with_smaller_weights() -> None:
    shape = Shape("", 10, 1, 64, 64)
    assert shape.intensity("lstm", "bfloat16") == 2 * shape.intensity("lstm")
    assert 3.8 < shape.intensity("lstm", "int8") / shape.intensity("lstm") < 4  # x, h: float32


# -- libraries ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["onnxruntime", "openvino"])
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: shape.label)
@pytest.mark.parametrize("cell", CELLS)
def test_onnx_runtimes_match_torch(name: str, cell: str, shape: Shape) -> None:
    pytest.importorskip("onnx")
    pytest.importorskip(name)
    request = task(cell, shape=shape)
    results = library(name).prepare(request).results()
    assert results["output"].shape == ModuleCall(nn, request).results()["output"].shape
    assert Referee(request).judge(name, results) < 1e-6


@pytest.mark.parametrize("shape", [*SHAPES, SINGLE], ids=lambda shape: shape.label)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("cell", CELLS)
def test_fastrnn_matches_torch(cell: str, mode: str, shape: Shape) -> None:
    request = task(cell, mode, shape)
    results = FASTRNN.prepare(request).results()
    assert results.keys() == TORCH.prepare(request).results().keys()
    assert ("d_x" in results) == (mode == "training")
    assert Referee(request).judge("fastrnn", results) < 1e-6


@pytest.mark.parametrize("shape", [TINY, SINGLE], ids=lambda shape: shape.label)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("cell", CELLS)
def test_bfloat16_tasks_are_computed_in_bfloat16(cell: str, mode: str, shape: Shape) -> None:
    request = task(cell, mode, shape, "bfloat16")
    referee = Referee(request)
    for one in (FASTRNN, TORCH):
        results = one.prepare(request).results()
        assert {value.dtype for value in results.values()} == {torch.bfloat16}
        assert 1e-5 < referee.judge(one.title, results) < 0.1


@pytest.mark.parametrize("name", ["fastrnn", "torch_int8", "onnxruntime"])
@pytest.mark.parametrize(
    "shape", [shape for shape in SHAPES if shape.hidden_size > 1], ids=lambda shape: shape.label
)
@pytest.mark.parametrize("cell", CELLS)
def test_int8_tasks_are_computed_with_int8_weights(name: str, cell: str, shape: Shape) -> None:
    one, request = library(name), task(cell, shape=shape, dtype="int8")
    if not one.installed or not one.supports(request):
        pytest.skip(f"{name} has no int8 {cell}")
    results = one.prepare(request).results()
    assert results["output"].dtype == torch.float32
    assert 1e-5 < Referee(request).judge(one.title, results) < 0.08


def test_only_an_lstm_has_an_int8_node() -> None:
    with pytest.raises(ValueError, match="cell must be 'lstm' for int8, got 'gru'"):
        onnx_model("gru", TINY, {}, int8=True)


def test_libraries_support_their_tasks() -> None:
    def supporting(**facts: Any) -> list[str]:
        return [one.name for one in LIBRARIES if one.supports(task(**facts))]

    both = ["fastrnn", "torch"]
    assert {FASTRNN, TORCH} <= set(installed_libraries())
    assert supporting() == [*both, "onnxruntime", "openvino"]
    assert supporting(mode="training") == both
    assert supporting(shape=SINGLE) == both
    for mode in MODES:
        assert supporting(mode=mode, dtype="bfloat16") == both
    assert supporting(dtype="int8") == [*both, "torch_int8", "onnxruntime"]
    assert supporting(cell="gru", dtype="int8") == [*both, "torch_int8"]
    assert supporting(cell="rnn", dtype="int8") == both
    assert supporting(mode="training", dtype="int8") == []
    assert supporting(shape=SINGLE, dtype="int8") == []
    assert TORCH.version == torch.__version__
    assert not Library("x", "X", TORCH.prepare, ("torch", "no_such_package")).installed


# -- agreement ------------------------------------------------------------------------------------


class Off(Call):
    """The results of torch plus a constant error."""

    def __init__(self, task: Task, by: float) -> None:
        self._call = TORCH.prepare(task)
        self._by = by

    def __call__(self) -> object:
        return self._call()

    def results(self) -> dict[str, Tensor]:
        return {name: value + self._by for name, value in self._call.results().items()}


def off(by: float) -> Library:
    return Library("off", "Off", lambda task: Off(task, by), ("torch",))


@pytest.mark.parametrize("by", [1e-4, float("nan")])
@pytest.mark.parametrize("mode", MODES)
def test_library_that_differs_is_not_timed(mode: str, by: float) -> None:
    found = measure.measure(task(mode=mode), (FASTRNN, TORCH, off(by)), seconds=0.001)
    assert found.rejected.keys() == {"off"}
    assert "Off differs from torch.nn in float64: output by " in found.rejected["off"]
    assert found.samples.keys() == found.errors.keys() == {"fastrnn", "torch"}
    assert found.ratio == found.medians["torch"] / found.medians["fastrnn"]


def test_a_task_is_measured_with_its_threads() -> None:
    torch.set_num_threads(2)  # the fixture of this file restores the number
    measure.measure(task(), (FASTRNN,), seconds=0.001)
    assert torch.get_num_threads() == 1


def test_machine_lists_every_package_once() -> None:
    facts = measure.machine(3, LIBRARIES, "int8")
    assert (facts["threads"], facts["dtype"]) == (3, "int8")
    assert facts.keys() >= {"fastrnn", "torch"}
    assert "torch_int8" not in facts


@pytest.mark.parametrize("dtype", ["bfloat16", "int8"])
def test_other_dtypes_are_measured(dtype: str) -> None:
    request = task(dtype=dtype)
    found = measure.measure(request, (FASTRNN, TORCH), seconds=0.001)
    assert found.samples.keys() == {"fastrnn", "torch"}
    assert measure.plan(request)["recurrent_format"].startswith(("native", dtype))


def test_referee_rejects_missing_and_wrong_results() -> None:
    request = task(mode="training")
    referee, results = Referee(request), TORCH.prepare(request).results()
    assert referee.judge("torch", results) < 1e-6
    with pytest.raises(Disagreement, match=r"d_x by inf, allowed: \d"):
        referee.judge("x", {name: value for name, value in results.items() if name != "d_x"})
    with pytest.raises(Disagreement, match="d_x by "):
        referee.judge("x", {**results, "d_x": results["d_x"] * 1.001})
    one = torch.ones(2, dtype=torch.float64)
    assert error(torch.ones(3), one) == float("inf")
    assert error(torch.ones(2), one) == 0


# -- time -----------------------------------------------------------------------------------------


def test_calls_are_interleaved(monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []
    calls = {name: lambda name=name: order.append(name) for name in "abc"}
    monkeypatch.setattr(timing, "pause", lambda: None)
    samples = interleaved(calls, seconds=1e-5)
    assert samples.keys() == calls.keys()
    for values in samples.values():
        assert len(values) >= MIN_ROUNDS
        assert all(value > 0 for value in values)
    turns = [name for before, name in zip(["", *order], order, strict=False) if name != before]
    assert len(turns) > 2 * len(calls)


def test_a_pause_lasts_until_no_thread_spins(monkeypatch: pytest.MonkeyPatch) -> None:
    used = [1.0, 0.9, 0.1, 1.0]
    monkeypatch.setattr(timing, "_cpus_in_use", lambda: used.pop(0))
    start = time.perf_counter()
    timing.pause()
    assert used == [1.0]
    assert time.perf_counter() - start >= timing.PAUSE_SECONDS >= 0.02
    monkeypatch.setattr(timing, "_cpus_in_use", lambda: 1.0)  # a library that never stops
    start = time.perf_counter()
    timing.pause()
    assert time.perf_counter() - start >= timing.LONGEST_WAIT_SECONDS


def test_use_of_the_cpus_is_measured() -> None:
    def spin() -> None:
        while not done.is_set():
            pass

    done = threading.Event()
    spinning = threading.Thread(target=spin)
    spinning.start()
    busy = max(timing._cpus_in_use() for _ in range(20))
    done.set()
    spinning.join()
    assert min(timing._cpus_in_use() for _ in range(20)) < 0.2 < busy


@pytest.mark.parametrize(
    ("model", "numbers", "flags", "name"),
    [
        ("AMD EPYC", "25 17", "avx2 avx512f avx512_bf16", "amd-epyc-25-17-avx512-bf16-2-cpus"),
        ("AMD EPYC 7763 64-Core Processor", "25 1", "avx avx2", "amd-epyc-7763-25-1-avx2-2-cpus"),
        (
            "Intel(R) Xeon(R) Platinum 8581C CPU @ 2.10GHz",
            "6 207",
            "avx2 avx512f avx512_bf16 amx_tile",
            "intel-xeon-platinum-8581c-6-207-amx-2-cpus",
        ),
        ("Intel(R) Xeon(R) Processor", "6 85", "avx2 avx512f", "intel-xeon-6-85-avx512-2-cpus"),
    ],
)
def test_machines_have_names(model: str, numbers: str, flags: str, name: str) -> None:
    family, number = numbers.split()
    facts = {"model name": model, "cpu family": family, "model": number, "flags": flags}
    assert machine_name(facts, cpus=2) == name


def test_this_machine_has_a_name() -> None:
    assert re.fullmatch(r"[a-z0-9-]+-\d+-cpus", machine_name())
    assert re.fullmatch(r"[a-z0-9-]+-4-cpus", machine_name({}, cpus=4))  # without /proc/cpuinfo


def test_fma_peak_is_positive_and_checks_arguments() -> None:
    assert 0.1 < _C.fma_peak(1, 0.001) < 10_000
    assert 0 < _C.fma_peak(1, 1e-6) < 10_000  # ends before a second thread starts
    with pytest.raises(ValueError, match="threads must be at least 1, got 0"):
        _C.fma_peak(0, 0.001)
    with pytest.raises(ValueError, match="seconds must be from"):
        _C.fma_peak(1, float("nan"))


# -- the command line -----------------------------------------------------------------------------

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Run:
    """Runs ``fastrnn compare`` in a temporary folder; returns exit code, output and errors."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments: Any) -> tuple[int, str, str]:
        capsys.readouterr()
        try:
            code = main(["compare", *map(str, arguments)])
        except SystemExit as error:  # raised by argparse
            code = int(error.code or 0)
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


SHAPE = ("--T", 3, "--hidden", 4, "--seconds", 0.001)


def test_given_shape_is_measured(run: Run, tmp_path: Path) -> None:
    options = ("--B", 2, "--input", 3, "--layers", 2, "--bidirectional", "--packed")
    code, out, err = run(*SHAPE, *options, "--threads", 1, "--cell", "gru", "--json", "out.json")
    assert (code, err) == (0, "")
    for mode in MODES:
        assert f"gru {mode} T3 B2 I3 H4 x2 bi packed: " in out
    for library in LIBRARIES:
        # in the table, or among those not installed
        assert (library.title in out) == ("float32" in library.cells)
    document = json.loads((tmp_path / "out.json").read_text())
    assert document["machine"]["threads"] == 1
    assert document["machine"]["torch"] == torch.__version__
    assert document["fma_peak"] > 0
    forward, training = document["results"]
    assert forward["ms"].keys() == {
        library.name for library in installed_libraries() if "float32" in library.cells
    }
    assert training["ms"].keys() == {"fastrnn", "torch"}
    assert training["ratio"] == pytest.approx(training["ms"]["torch"] / training["ms"]["fastrnn"])
    assert forward["plan"]["isa"] == _C.cpu_capability()


def test_default_shapes_are_measured(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command, "DEFAULT_SHAPES", (TINY, SINGLE))
    code, out, _ = run("--cell", "rnn", "--mode", "forward", "--seconds", 0.001)
    assert code == 0
    assert f"rnn forward {TINY.label}: " in out
    assert f"rnn forward {SINGLE.label}: " in out


def test_library_that_differs_is_reported(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    libraries = (FASTRNN, TORCH, off(1.0))
    monkeypatch.setattr(command, "LIBRARIES", libraries)
    monkeypatch.setattr(command, "installed_libraries", lambda: libraries)
    code, out, err = run(*SHAPE, "--cell", "rnn", "--mode", "forward")
    assert code == 1
    assert re.search(r"^  Off +differs$", out, re.MULTILINE)
    assert err.startswith("fastrnn compare: rnn forward T3 B1 I4 H4: Off differs from torch.nn")
    assert err.count("\n") == 1


def test_missing_libraries_are_listed(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command, "installed_libraries", lambda: (FASTRNN, TORCH))
    code, out, _ = run(*SHAPE, "--cell", "rnn", "--mode", "forward")
    assert code == 0
    assert "not installed: ONNX Runtime, OpenVINO; install: pip install 'fastrnn[bench]'" in out


def test_terminal_gets_a_rich_table(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("rich")
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    code, out, _ = run(*SHAPE, "--cell", "rnn", "--mode", "training")
    assert code == 0
    assert re.search(r"fastrnn +\d+\.\d{3} +1\.00", re.sub(r"\x1b\[[0-9;]*m", "", out))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--hidden 0", "--hidden must be a whole number from 1 to 1,000,000, got 0"),
        ("--T -3", "--T must be a whole number from 1"),
        ("--B 1000001", "--B must be a whole number from 1 to 1,000,000, got 1,000,001"),
        ("--input 0", "--input must be"),
        ("--layers 0", "--layers must be"),
        ("--threads 0", "--threads must be a whole number from 1 to 1,024, got 0"),
        ("--hidden many", "--hidden"),
        ("--cell cnn", "cnn"),
        ("--mode sideways", "sideways"),
        ("--seconds 0", "--seconds must be above 0 and at most 600, got 0"),
        ("--seconds nan", "--seconds must be above 0 and at most 600, got nan"),
        ("--packed", "--bidirectional and --packed need a shape"),
        ("--hidden 2 --json no/such/folder", "--json no/such/folder: cannot be written (No such"),
        ("text", "text"),
    ],
)
def test_wrong_argument_is_a_one_line_error(run: Run, arguments: str, message: str) -> None:
    code, _, err = run(*arguments.split())
    assert code == 2
    assert message in err
    assert err.startswith("fastrnn compare: ")
    assert err.count("\n") == 1


def test_out_of_memory_is_a_one_line_error(run: Run) -> None:
    code, _, err = run("--T", 1_000_000, "--B", 1_000_000, "--input", 1000, "--hidden", 1)
    assert (code, err) == (1, "fastrnn compare: out of memory; try smaller sizes\n")


def test_help_is_printed(run: Run) -> None:
    code, out, _ = run("--help")
    assert code == 0
    assert "usage: fastrnn compare" in out

"""Speed on a GPU, compared with torch.nn (cuDNN): both schedules and fastrnn's own choice.

    python bench/cuda_speed.py --json FILE [--report FILE.md] [--budget SECONDS] [--seconds 0.2]
           [--blocks flashrnn ...] [--cells ...] [--dtypes ...] [--modes ...] [--commit TEXT]

A task is a shape of `cuda_grid.py`, a cell, a dtype and forward or training (forward and backward,
to the weights and the input). The input product is included. The contestants get the same weights
and input:

    stepwise, persistent   fastrnn with this FASTRNN_SCHEDULE; persistent only if the layer fits
    auto                   fastrnn's own choice
    torch                  torch.nn, which runs cuDNN

Before any timing, outputs and gradients are compared with torch.nn in float64 from the same rounded
values. The error bound is four times the error of torch.nn in the same dtype, or 16 units in the
last place if that is larger; for TF32 also four times the error of torch.nn in float16, whose
products have as many bits. Results outside the error bound, or produced by other kernels than
planned, are rejected. Then the contestants are measured interleaved and in random order, in five
rounds (three if calls take long). A measurement is an untimed call and then calls between CUDA
events, of which the median counts. The result is the median of the rounds.

FILE is written after every task. If FILE exists, the same command continues after the tasks that
it holds, and skips a task that was running when the command was cut off. Tasks are ordered so that
all blocks come early. --budget starts no task after this many seconds; 0 only writes the report.
--report writes tables in Markdown.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from cuda_grid import BLOCKS, DTYPES, POINTS, GpuTask, tasks, tiny
from cuda_report import report
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

import fastrnn
from fastrnn import _C, _library
from fastrnn.tools.benchmark.agreement import ERROR_FLOOR, MAX_TORCH_ERRORS, error
from fastrnn.tools.benchmark.shapes import CELLS, MODES

SCHEDULES = ("stepwise", "persistent", "auto")
ROUNDS = 5
FEWEST_ROUNDS = 3  # if calls take long
MOST_CALLS = 200  # per round
CLASSES = {"rnn": "RNN", "gru": "GRU", "lstm": "LSTM"}
PLAN_CELLS = {"rnn": "rnn_tanh", "gru": "gru", "lstm": "lstm"}
TORCH_DTYPES = {
    "float32": torch.float32,
    "tf32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
}
FLOORS = {dtype: 16 * torch.finfo(dtype).eps for dtype in (torch.float16, torch.bfloat16)}


def allow_tf32(allowed: bool) -> None:
    """Sets both of torch's TF32 switches."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = allowed


class Problem:
    """Weights, input and gradient of the output of a task, on the device, for all contestants.

    Args:
        task: the measurement.
        device: the device of the tensors.
    """

    def __init__(self, task: GpuTask, device: str) -> None:
        point, generator = task.at.point, torch.Generator(device).manual_seed(1)
        self.task, self.device = task, device

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, device=device)

        torch.manual_seed(0)
        self.weights = self._module(nn, torch.float32).state_dict()
        x = normal(point.steps, point.batch, point.input_size)
        self.batch_sizes: Tensor | None = None
        if point.packed:
            packed = pack_padded_sequence(x, torch.tensor(point.lengths))
            x, self.batch_sizes = packed.data, packed.batch_sizes
        self.x = x
        self.d_output = None
        if task.mode == "training":
            self.d_output = normal(*x.shape[:-1], point.output_size)

    def _module(self, classes: Any, dtype: torch.dtype) -> nn.Module:
        point = self.task.at.point
        module: nn.Module = getattr(classes, CLASSES[self.task.cell])(
            point.input_size,
            point.hidden_size,
            point.layers,
            bidirectional=point.bidirectional,
            device=self.device,
            dtype=dtype,
            **({"proj_size": point.proj_size} if point.proj_size > 0 else {}),
        )
        return module

    def call(self, classes: Any, dtype: torch.dtype, rounded: torch.dtype) -> Call:
        """A library's module in ``dtype``, on values that were first rounded to ``rounded``."""
        module = self._module(classes, dtype)
        module.load_state_dict(
            {name: weight.to(rounded).to(dtype) for name, weight in self.weights.items()}
        )
        if isinstance(module, nn.RNNBase) and classes is nn and self.device != "cpu":
            flatten(module)
        d_output = None if self.d_output is None else self.d_output.to(rounded).to(dtype)
        return Call(module, self.x.to(rounded).to(dtype), self.batch_sizes, d_output)


class Call:
    """Module with its input, ready to run; ``d_output`` None: forward without gradients."""

    def __init__(
        self, module: nn.Module, x: Tensor, batch_sizes: Tensor | None, d_output: Tensor | None
    ) -> None:
        # cuDNN keeps what backward needs whenever a module is in training mode
        self.module, self.d_output = module.train(d_output is not None), d_output
        self.leaf = x if d_output is None else x.requires_grad_()
        self.x = x if batch_sizes is None else PackedSequence(x, batch_sizes)
        self.names = ["x", *(name for name, _ in module.named_parameters())]
        self.leaves = [self.leaf, *module.parameters()]

    def __call__(self) -> tuple[Tensor, ...]:
        """Returns the output, and in training the gradients of the input and the weights."""
        if self.d_output is None:
            with torch.no_grad():
                return (self._output(),)
        output = self._output()
        return output.detach(), *torch.autograd.grad(output, self.leaves, self.d_output)

    def _output(self) -> Tensor:
        output = self.module(self.x)[0]
        rows: Tensor = output.data if isinstance(output, PackedSequence) else output
        return rows

    def results(self) -> dict[str, Tensor]:
        """Returns the results of a call by name."""
        output, *gradients = self()
        named = {f"d_{name}": d for name, d in zip(self.names, gradients, strict=False)}
        return {"output": output, **named}


def flatten(module: nn.RNNBase) -> None:
    """Arranges torch.nn's weights in cuDNN's layout, in bfloat16 too.

    ``flatten_parameters`` skips bfloat16, so that cuDNN would copy the weights at each call.
    """
    weights: list[Any] = module._flat_weights
    # some releases of cuDNN do not support the type
    with torch.no_grad(), contextlib.suppress(RuntimeError):
        torch._cudnn_rnn_flatten_weight(
            weights,
            len(weights) // (module.num_layers * (2 if module.bidirectional else 1)),
            module.input_size,
            torch.backends.cudnn.rnn.get_cudnn_mode(module.mode),
            module.hidden_size,
            module.proj_size,
            module.num_layers,
            module.batch_first,
            module.bidirectional,
        )


def captured(call: Callable[[], object]) -> Callable[[], object]:
    """Captures a call in a CUDA graph and returns its replay."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


def plans(task: GpuTask, schedule: str, chip: Mapping[str, int]) -> list[dict[str, Any]]:
    """Plans of the first layer: forward, and in training backward."""
    point = task.at.point
    return [
        dict(
            _C.cuda_plan(
                PLAN_CELLS[task.cell],
                point.steps,
                point.batch,
                point.input_size,
                point.hidden_size,
                point.proj_size,
                dtype=str(TORCH_DTYPES[task.dtype]).removeprefix("torch."),
                training=training,
                directions=point.directions,
                tf32=task.dtype == "tf32",
                schedule=schedule,
                **chip,
            )
        )
        for training in ([False, True] if task.mode == "training" else [False])
    ]


def runs_persistently(call: Callable[[], object]) -> bool | None:
    """Whether a call launches a persistent kernel, None if the profiler sees no kernels."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        call()
        torch.cuda.synchronize()
    names = [event.name for event in profile.events() or []]
    if not any("fastrnn" in name for name in names):
        return None
    return any("walk_kernel" in name for name in names)


def chip(device: str) -> dict[str, int]:
    """Properties of the GPU that a plan depends on; without a GPU empty, which means an H100."""
    if device == "cpu":
        return {}
    about = torch.cuda.get_device_properties(device)
    known = {"capability": about.major, "multiprocessors": about.multi_processor_count}
    shared = getattr(about, "shared_memory_per_block_optin", None)
    return known if shared is None else {**known, "shared_bytes": shared}


class Clock:
    """Times calls, with CUDA events on a GPU and with the wall clock on the CPU."""

    def __init__(self, device: str) -> None:
        self._on_gpu = device != "cpu"

    def wait(self) -> None:
        """Waits until the device has finished."""
        if self._on_gpu:
            torch.cuda.synchronize()

    def times(self, call: Callable[[], object], count: int) -> list[float]:
        """Seconds of each of ``count`` successive calls, after an untimed call."""
        call()
        self.wait()
        if not self._on_gpu:
            marks = [time.perf_counter()]
            for _ in range(count):
                call()
                marks.append(time.perf_counter())
            return [b - a for a, b in itertools.pairwise(marks)]
        events = [torch.cuda.Event(enable_timing=True) for _ in range(count + 1)]
        events[0].record()
        for event in events[1:]:
            call()
            event.record()
        self.wait()
        return [a.elapsed_time(b) * 1e-3 for a, b in itertools.pairwise(events)]


def interleaved(
    calls: Mapping[str, Callable[[], object]], seconds: float, clock: Clock
) -> dict[str, list[float]]:
    """Median seconds per call of each round, by name, spending ``seconds`` per contestant."""
    once = {name: min(clock.times(call, 2)) for name, call in calls.items()}
    # An untimed call and at least one timed call per round.
    rounds = min(ROUNDS, max(FEWEST_ROUNDS, round(seconds / max(1e-7, *once.values()))))
    counts = {
        name: min(MOST_CALLS, max(1, round(seconds / rounds / max(first, 1e-7))))
        for name, first in once.items()
    }
    medians: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name in random.sample(list(calls), len(calls)):
            medians[name].append(statistics.median(clock.times(calls[name], counts[name])))
    return medians


def allowances(problem: Problem, truth: Mapping[str, Tensor]) -> tuple[dict[str, float], float]:
    """Error bound of each result, and the largest error of torch.nn itself."""
    dtype = TORCH_DTYPES[problem.task.dtype]
    found = problem.call(nn, dtype, dtype).results()
    own = {name: error(found[name], truth[name]) for name in truth}
    allowed = dict(own)
    if problem.task.dtype == "tf32":
        found = problem.call(nn, torch.float16, torch.float16).results()
        allowed = {name: max(own[name], error(found[name], truth[name])) for name in truth}
    floor = FLOORS.get(dtype, ERROR_FLOOR)
    return {n: max(MAX_TORCH_ERRORS * e, floor) for n, e in allowed.items()}, max(own.values())


def measure(task: GpuTask, device: str, seconds: float) -> dict[str, Any]:
    """Checks and times a task; returns its entry in the file."""
    about, clock = chip(device), Clock(device)
    allow_tf32(task.dtype == "tf32")
    dtype = TORCH_DTYPES[task.dtype]
    line: dict[str, Any] = {
        "task": task.label,
        "block": task.at.point.block,
        "cell": task.cell,
        "mode": task.mode,
        "dtype": task.dtype,
        "label": task.at.label,
        "point": asdict(task.at.point),
        "graph": task.at.graph,
        "flops": task.at.point.flops(task.cell, task.mode),
        "plan": plans(task, "auto", about),
        "errors": {},
        "rejected": {},
        "seconds": {},
        "rounds": {},
    }
    schedules = list(SCHEDULES)
    asked = plans(task, "persistent", about)
    if all(plan["schedule"] == "stepwise" for plan in asked):
        schedules.remove("persistent")

    problem = Problem(task, device)
    truth = problem.call(nn, torch.float64, dtype).results()
    allowed, line["errors"]["torch"] = allowances(problem, truth)
    ours, theirs = problem.call(fastrnn, dtype, dtype), problem.call(nn, dtype, dtype)
    calls: dict[str, Callable[[], object]] = {}

    def with_schedule(name: str, call: Callable[[], object]) -> Callable[[], object]:
        def asking() -> object:
            os.environ["FASTRNN_SCHEDULE"] = name
            return call()

        return asking

    for name in schedules:
        os.environ["FASTRNN_SCHEDULE"] = name
        results = ours.results()
        errors = {key: error(results[key], truth[key]) for key in truth}
        line["errors"][name] = max(errors.values())
        wrong = [key for key in errors if not errors[key] <= allowed[key]]
        planned = any(plan["schedule"] == "persistent" for plan in plans(task, name, about))
        if wrong:
            line["rejected"][name] = (
                f"differs from float64: {wrong[0]} by {errors[wrong[0]]:.1e}, "
                f"allowed is {allowed[wrong[0]]:.1e}"
            )
        elif device != "cpu" and runs_persistently(ours) is (not planned):
            line["rejected"][name] = (
                f"ran {'stepwise' if planned else 'persistent'} kernels, which are not planned"
            )
        else:
            calls[name] = with_schedule(name, ours)
    calls["torch"] = theirs
    del results, truth
    if task.at.graph and device != "cpu":
        for name, call in list(calls.items()):
            try:
                calls[name] = captured(call)
            except RuntimeError as capture_error:
                del calls[name]
                first = str(capture_error).splitlines()[0]
                line["rejected"][name] = f"cannot be captured in a graph: {first}"
    line["rounds"] = interleaved(calls, seconds, clock)
    line["seconds"] = {name: statistics.median(times) for name, times in line["rounds"].items()}
    return line


def measure_or_record_failure(task: GpuTask, device: str, seconds: float) -> dict[str, Any]:
    """Like `measure`, but records a failed call or a lack of memory in the entry."""
    try:
        return measure(task, device, seconds)
    except RuntimeError as failure:  # torch.OutOfMemoryError is one
        return failed_entry(task, str(failure).splitlines()[0])


def failed_entry(task: GpuTask, why: str) -> dict[str, Any]:
    """Entry of a task that could not be measured."""
    about = {"task": task.label, "block": task.at.point.block, "cell": task.cell}
    about |= {"mode": task.mode, "dtype": task.dtype, "label": task.at.label}
    return {
        **about,
        "plan": [],
        "errors": {},
        "rejected": {"all": why},
        "seconds": {},
        "rounds": {},
    }


# -- machine and results file ----------------------------------------------------------------------


def output_of(*command: str) -> str:
    """First line that a program prints, "" if it cannot run."""
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, check=True, cwd=Path(__file__).parent
        )
    except (OSError, subprocess.CalledProcessError):
        return ""
    return (done.stdout.splitlines() or [""])[0].strip()


def commit() -> str:
    """Commit of this repository, followed by + if there are uncommitted changes."""
    found = output_of("git", "rev-parse", "--short=10", "HEAD")
    changed = output_of("git", "status", "--porcelain", "--untracked-files=no")
    return found + ("+" if changed else "") if found else "unknown"


def machine(device: str, commit_name: str) -> dict[str, Any]:
    """Device, driver and versions."""
    about: dict[str, Any] = {"device": "cpu (a rehearsal)"}
    if device != "cpu":
        driver = output_of("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
        about = {
            "device": torch.cuda.get_device_name(device),
            "driver": driver or "unknown",
            "CUDA": torch.version.cuda,
            "cuDNN": torch.backends.cudnn.version(),
        }
    return {
        **about,
        "torch": torch.__version__,
        "fastrnn": fastrnn.__version__,
        "commit": commit_name,
    }


class Results:
    """Results file, rewritten after every task.

    Args:
        path: the file; None keeps the results in memory.
        about: the machine. A file from another machine is not continued.
    """

    def __init__(self, path: Path | None, about: dict[str, Any]) -> None:
        self._path = path
        self.document: dict[str, Any] = {"machine": about, "results": []}
        if path is not None and path.exists():
            self.document = read(path)
            if self.document["machine"] != about:
                raise SystemExit(
                    f"{path}: was measured on another machine, with other versions or at another "
                    "commit. Choose another file."
                )

    @property
    def done(self) -> set[str]:
        """Labels of the tasks in the file."""
        return {line["task"] for line in self.document["results"]}

    def begin(self, task: GpuTask) -> None:
        """Records the running task, so that it is skipped later if it never ends."""
        self.document["under_way"] = task.label
        self._write()

    def interrupted(self) -> str | None:
        """Removes and returns the task that was running when the file was last written."""
        label: str | None = self.document.pop("under_way", None)
        return label

    def add(self, line: dict[str, Any]) -> None:
        """Adds an entry."""
        self.document["results"].append(line)
        self.document.pop("under_way", None)
        self._write()

    def _write(self) -> None:
        if self._path is None:
            return
        new = self._path.with_name(self._path.name + ".new")
        new.write_text(json.dumps(self.document, indent=1) + "\n", encoding="utf-8")
        new.replace(self._path)


def read(path: Path) -> dict[str, Any]:
    """Reads a results file.

    Raises:
        SystemExit: the file cannot be read, or was not written by this program.
    """
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        document["machine"]["commit"], [line["task"] for line in document["results"]]
    except OSError as problem:
        raise SystemExit(f"{path}: cannot be read ({problem.strerror})") from problem
    except (ValueError, KeyError, TypeError):
        raise SystemExit(f"{path}: must be a result of cuda_speed.py --json FILE") from None
    found: dict[str, Any] = document
    return found


# -- the command ----------------------------------------------------------------------------------


def row(line: Mapping[str, Any]) -> str:
    """One line per task for the terminal."""
    times = "".join(
        f"{line['seconds'][name] * 1e3:11.3f}" if name in line["seconds"] else f"{'-':>11}"
        for name in (*SCHEDULES, "torch")
    )
    chosen = "/".join(plan["schedule"] for plan in line["plan"])
    rejections = "".join(f"   {name}: {why}" for name, why in line["rejected"].items())
    return f"{line['task']:<58}{times}   {chosen}{rejections}"


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, known in (
        ("blocks", BLOCKS),
        ("cells", CELLS),
        ("dtypes", DTYPES),
        ("modes", MODES),
    ):
        parser.add_argument(f"--{name}", nargs="+", default=known, choices=known, metavar="NAME")
    parser.add_argument("--seconds", type=float, default=0.2, help="time per contestant and task")
    parser.add_argument("--budget", type=float, help="start no task after this many seconds")
    parser.add_argument("--json", type=Path, metavar="FILE", help="results file")
    parser.add_argument("--report", type=Path, metavar="FILE", help="report in Markdown")
    parser.add_argument("--commit", help="name of the code (default: from git)")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"), help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if not options.seconds > 0:
        parser.error(f"--seconds must be above 0, got {options.seconds}")
    if options.budget is not None and options.budget < 0:
        parser.error(f"--budget must be at least 0, got {options.budget}")
    if options.budget == 0 and (options.json is None or options.report is None):
        parser.error("--budget 0 only writes a report and needs --json and --report")
    return options


def is_broken(device: str) -> bool:
    """Whether the GPU has failed for this process."""
    try:
        Clock(device).wait()
    except RuntimeError:
        return True
    return False


def main(arguments: Sequence[str] | None = None) -> int:
    begin = time.monotonic()
    options = parse(arguments)
    if options.budget == 0:
        options.report.write_text(report(read(options.json)), encoding="utf-8")
        return 0
    if options.device == "cuda":
        if not torch.cuda.is_available():
            raise SystemExit("cuda_speed.py needs a CUDA device; torch found none.")
        if not _library.cuda_kernels:
            raise SystemExit(f"cuda_speed.py needs fastrnn's CUDA kernels: {_library.why_no_cuda}.")
    results = Results(options.json, machine(options.device, options.commit or commit()))
    points = [at for at in POINTS if at.point.block in options.blocks]
    if options.device == "cpu":
        points = [tiny(at) for at in points]
    chosen = tasks(points, options.cells, options.dtypes, options.modes)
    interrupted = results.interrupted()
    for task in chosen:
        if task.label == interrupted and task.label not in results.done:
            results.add(failed_entry(task, "the measurement was cut off"))
    done = results.done
    print(", ".join(f"{key} {value}" for key, value in results.document["machine"].items()))
    print(f"{'ms':<58}" + "".join(f"{name:>11}" for name in (*SCHEDULES, "torch")) + "   auto runs")
    left = [task for task in chosen if task.label not in done]
    count, status = 0, 0
    for task in left:
        if options.budget is not None and time.monotonic() - begin > options.budget:
            break
        results.begin(task)
        line = measure_or_record_failure(task, options.device, options.seconds)
        results.add(line)
        count += 1
        print(row(line), flush=True)
        if options.device != "cpu":
            torch.cuda.empty_cache()
        if is_broken(options.device):
            print("The GPU has failed. The same command continues after this task.", flush=True)
            status = 1
            break
    print(f"{count} tasks measured, {len(left) - count} of {len(chosen)} left")
    if options.report is not None:
        options.report.write_text(report(results.document), encoding="utf-8")
    return status


if __name__ == "__main__":
    sys.exit(main())

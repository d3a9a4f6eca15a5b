"""Turns the results of `cuda_speed.py` into a page: machine, means, all tasks."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

SCHEDULES = ("stepwise", "persistent")
OWN_CHOICE, PEER = "auto", "torch"
#: the other schedule must be faster by this factor for the choice to count as wrong
WORTH = 1.05


def ratio(line: Mapping[str, Any]) -> float | None:
    """Time of torch.nn divided by fastrnn's (schedule auto), None if either is missing."""
    seconds = line["seconds"]
    if OWN_CHOICE not in seconds or PEER not in seconds:
        return None
    return float(seconds[PEER] / seconds[OWN_CHOICE])


def report(document: Mapping[str, Any]) -> str:
    """Markdown: the machine, means, all tasks, wrong choices, and rejected measurements."""
    about = ", ".join(f"{key} {value}" for key, value in document["machine"].items())
    lines = document["results"]
    timed = sorted((found, line["task"], line) for line in lines if (found := ratio(line)))
    parts = [
        "# Speed on a GPU",
        "",
        f"Measured on one machine: {about}. Each time is the median of interleaved rounds, "
        "measured with CUDA events around whole calls of a layer, including the product of the "
        "input. Training is forward and backward, to the weights and the input. torch.nn runs "
        "cuDNN. The ratio is torch.nn's time divided by the time of fastrnn's own choice (auto): "
        "above 1, fastrnn is faster. float32 has both of torch's TF32 switches off, tf32 has both "
        "on. Outputs and gradients were first compared with float64; results outside the error "
        "bound are not timed.",
        "",
        f"{len(timed)} of {len(lines)} tasks have a ratio.",
        "",
    ]
    if timed:
        measured = [line for *_, line in timed]
        parts += [*_means(measured, ["all"]), ""]
        parts += ["## All tasks, lowest ratio first", "", *_table(timed), ""]
        blocks = sorted({line["block"] for line in measured})
        parts += ["## Means by block of shapes", "", *_means(measured, blocks), ""]
    parts += [*_choices(lines), *_rejections(lines)]
    return "\n".join(parts).rstrip("\n") + "\n"


def geometric_mean(values: Iterable[float]) -> float:
    return math.exp(statistics.fmean(map(math.log, values)))


def _row(cells: Iterable[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _header(names: Sequence[str], left: int) -> list[str]:
    """First two lines of a table whose ``left`` first columns hold text."""
    return [_row(names), "|" + "---|" * left + "--:|" * (len(names) - left)]


def _kind(line: Mapping[str, Any]) -> tuple[str, str, str]:
    return line["cell"], line["mode"], line["dtype"]


def _means(lines: Sequence[Mapping[str, Any]], blocks: Sequence[str]) -> list[str]:
    found = _header(["block", "cell", "mode", "dtype", "tasks", "lowest ratio", "mean ratio"], 4)
    for kind in sorted({_kind(line) for line in lines}):
        own = [line for line in lines if _kind(line) == kind]
        for block in blocks:
            ratios = [ratio(line) for line in own if block in ("all", line["block"])]
            known = [value for value in ratios if value is not None]
            if known:
                figures = [str(len(known)), f"{min(known):.2f}", f"{geometric_mean(known):.2f}"]
                found.append(_row([block, *kind, *figures]))
    return found


def _table(timed: Iterable[tuple[float, str, Mapping[str, Any]]]) -> list[str]:
    names = ["block", "cell", "mode", "dtype", "shape", "auto runs"]
    names += ["stepwise ms", "persistent ms", "auto ms", "torch.nn ms", "ratio", "TFLOP/s"]
    found = _header(names, 6)
    for value, _, line in timed:
        seconds = line["seconds"]
        times = [
            f"{seconds[name] * 1e3:.3f}" if name in seconds else ""
            for name in (*SCHEDULES, OWN_CHOICE, PEER)
        ]
        texts = [line[key] for key in ("block", "cell", "mode", "dtype", "label")]
        teraflops = line["flops"] / seconds[OWN_CHOICE] * 1e-12
        texts += [_walk(line["plan"]), *times, f"{value:.2f}", f"{teraflops:.2f}"]
        found.append(_row(texts))
    return found


def _walk(plans: Sequence[Mapping[str, Any]]) -> str:
    """Describes a plan: ``persistent 96x1 of 8`` is unit blocks x row groups of units per block.

    Lists forward / backward where they differ.
    """

    def text(plan: Mapping[str, Any]) -> str:
        if plan["schedule"] == "stepwise":
            return "stepwise"
        return f"persistent {plan['unit_blocks']}x{plan['row_groups']} of {plan['units']}"

    return " / ".join(dict.fromkeys(map(text, plans)))


def _choices(lines: Iterable[Mapping[str, Any]]) -> list[str]:
    """Tasks in which the schedule that was not chosen is faster."""
    wrong = []
    for line in lines:
        seconds = line["seconds"]
        if OWN_CHOICE not in seconds:
            continue
        best = min((seconds[name], name) for name in (*SCHEDULES, OWN_CHOICE) if name in seconds)
        gain = seconds[OWN_CHOICE] / best[0]
        if gain > WORTH and {plan["schedule"] for plan in line["plan"]} != {best[1]}:
            wrong.append((gain, line["task"], best[1], _walk(line["plan"])))
    if not wrong:
        return []
    title = f"## Where the other schedule is more than {WORTH - 1:.0%} faster"
    found = [title, "", *_header(["task", "auto runs", "faster", "by"], 3)]
    for gain, task, best_name, chosen in sorted(wrong, reverse=True):
        found.append(_row([task, chosen, best_name, f"{gain:.2f}"]))
    return [*found, ""]


def _rejections(lines: Iterable[Mapping[str, Any]]) -> list[str]:
    rejected = [
        f"- {line['task']}, {name}: {why}"
        for line in lines
        for name, why in line["rejected"].items()
    ]
    return ["## Not timed", "", *rejected, ""] if rejected else []

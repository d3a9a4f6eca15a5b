"""A name for the machine, which its folder of results has."""

from __future__ import annotations

import os
import platform
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Final

#: name of the instruction set, and its flag in /proc/cpuinfo; the first one that the CPU has counts
_FEATURES: Final = {
    "amx": "amx_tile",
    "avx512-bf16": "avx512_bf16",
    "avx512": "avx512f",
    "avx2": "avx2",
}
#: words that distinguish no CPUs: trademarks, clock, number of cores
_NOISE: Final = re.compile(r"\((r|tm)\)|@.*|\b(cpu|processor|\d+-core)\b", re.IGNORECASE)


def cpu_facts() -> dict[str, str]:
    """Returns the facts of /proc/cpuinfo about the first CPU, without them an empty dictionary."""
    path = Path("/proc/cpuinfo")
    first = path.read_text().strip().partition("\n\n")[0] if path.exists() else ""
    pairs = (line.partition(":") for line in first.splitlines())
    return {key.strip(): value.strip() for key, _, value in pairs}


def machine_name(facts: Mapping[str, str] | None = None, cpus: int | None = None) -> str:
    """Returns a name such as ``amd-epyc-25-17-avx512-bf16-2-cpus``.

    It consists of the CPU's model name, family and model number (virtual machines often hide the
    rest of the model name), its largest instruction set, and the number of usable CPUs.

    Args:
        facts: facts of /proc/cpuinfo, by default this machine's.
        cpus: usable CPUs, by default this process's.
    """
    facts = cpu_facts() if facts is None else facts
    cpus = len(os.sched_getaffinity(0)) if cpus is None else cpus
    model = _NOISE.sub(" ", facts.get("model name", platform.machine()))
    flags = facts.get("flags", "").split()
    feature = next((name for name, flag in _FEATURES.items() if flag in flags), "")
    parts = [model, facts.get("cpu family", ""), facts.get("model", ""), feature, f"{cpus} cpus"]
    words = re.findall(r"[a-z0-9]+", " ".join(parts).lower())
    return "-".join(words)

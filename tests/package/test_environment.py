"""Environment variables: an invalid value raises one error, and docs/environment.md lists all."""

from __future__ import annotations

import ctypes
import re
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from support import run_python

from fastrnn import _C, _library

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "environment.md"

IMPORT = """
try:
    import fastrnn
    from fastrnn import _C
    print("imported", _C.cpu_capability(), _C.max_threads())
except Exception as error:
    print(type(error).__name__, error)
"""

BAD = [
    ("FASTRNN_ISA", "typo", "one of the instruction sets that this machine has, "),
    ("FASTRNN_ISA", "avx2 ", "one of the instruction sets that this machine has, "),
    ("FASTRNN_THREADS", "two", "a whole number from 0 (no bound) to 2147483647"),
    ("FASTRNN_THREADS", "-1", "a whole number from 0 (no bound) to 2147483647"),
    ("FASTRNN_THREADS", "1.5", "a whole number from 0 (no bound) to 2147483647"),
    ("FASTRNN_THREADS", "9" * 40, "a whole number from 0 (no bound) to 2147483647"),
    ("FASTRNN_L2_KB", "2M", "a whole number from 0 (a fast L3) to 1048576"),
    ("FASTRNN_L2_KB", "1048577", "a whole number from 0 (a fast L3) to 1048576"),
    ("FASTRNN_POISON", "yes", "0 or 1"),
    ("FASTRNN_EMULATE_AMX", "2", "0 or 1"),
    ("FASTRNN_WIDEN_BYTES", "16", "32 or 64"),
    ("FASTRNN_VERBOSE", "yes", "0 or 1"),
]


@pytest.mark.parametrize(("name", "value", "expected"), BAD)
def test_invalid_value_raises_at_import(name: str, value: str, expected: str) -> None:
    printed = run_python(IMPORT, **{name: value})
    assert printed.startswith(f"ValueError fastrnn: {name} must be {expected}")
    assert printed.endswith(f", got '{value}'.")


def test_instruction_set_of_other_cpus_raises() -> None:
    lacking = [name for name in ("avx512", "avx2", "sve") if name not in _C.available_isas()]
    printed = run_python(IMPORT, FASTRNN_ISA=lacking[0])
    assert f"{', '.join(_C.available_isas())}, got '{lacking[0]}'." in printed


def test_empty_values_are_the_defaults() -> None:
    empty = {name: "" for name, *_ in BAD}
    assert run_python(IMPORT, **empty) == run_python(IMPORT)


def test_valid_values_are_used() -> None:
    good = {"FASTRNN_ISA": "baseline", "FASTRNN_THREADS": "007", "FASTRNN_POISON": "0"}
    assert run_python(IMPORT, **good) == "imported baseline 7"
    for size in ("32", "64"):
        assert run_python(IMPORT, FASTRNN_WIDEN_BYTES=size).startswith("imported")


def test_value_that_becomes_invalid_raises_at_use(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("FASTRNN_ISA", "typo")
    with pytest.raises(ValueError, match="FASTRNN_ISA must be one of"):
        _C.set_isa(None)
    with pytest.raises(ValueError, match="FASTRNN_ISA must be one of"):
        _C.check_settings()
    monkeypatch.delenv("FASTRNN_ISA")
    _C.set_isa(None)


@pytest.mark.skipif(not (ROOT / "setup.py").exists(), reason="needs the source tree")
def test_page_lists_every_variable() -> None:
    """The page lists exactly the variables that the source reads."""
    patterns = (
        r'getenv\("(\w+)"\)',
        r'\bsetting\("(\w+)"\)',
        r'environ(?:\.get\(|\.setdefault\(|\[)"(\w+)"',
        r'"(\w+)" (?:not )?in os\.environ',
    )
    sources = [ROOT / "setup.py"]
    for folder, endings in (
        ("csrc", ("*.cpp", "*.h", "*.cu", "*.cuh")),
        ("fastrnn", ("*.py",)),
        ("examples", ("*.py",)),
        ("build_backend", ("*.py",)),
        ("bench", ("*.py",)),
        ("tests", ("test_cuda.py",)),
    ):
        for ending in endings:
            sources += (ROOT / folder).rglob(ending)
    found: set[str] = set()
    for source in sources:
        text = source.read_text(encoding="utf-8")
        for pattern in patterns:
            found |= set(re.findall(pattern, text))
    rows = re.findall(r"^\| (`[^|]+) \|", PAGE.read_text(encoding="utf-8"), re.MULTILINE)
    listed = {name for row in rows for name in re.findall(r"`(\w+)`", row)}
    assert {name for name in found if name.startswith("FASTRNN_")} >= {"FASTRNN_SCHEDULE"}
    elsewhere = {"NVCC_APPEND_FLAGS", "MAX_JOBS"}  # read by nvcc and torch
    assert found == listed - elsewhere


# --- CUDA versions -------------------------------------------------------------------------------


def warned(monkeypatch: pytest.MonkeyPatch, built: str | None, here: str | None) -> list[str]:
    facts: Any = {**_C.build_info(), "cuda": built is not None, "cuda_version": built}
    monkeypatch.setattr(_library._C, "build_info", lambda: facts)
    monkeypatch.setattr(torch.version, "cuda", here)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        _library._warn_of_other_cuda_major()
    return [str(warning.message) for warning in caught]


def test_other_cuda_major_warns_once(monkeypatch: pytest.MonkeyPatch) -> None:
    (sentence,) = warned(monkeypatch, "12.8", "13.0")
    assert sentence == (
        "fastrnn was built for CUDA 12.8 and torch has CUDA 13.0: fastrnn runs on the CPU only. "
        "Install a fastrnn that was built for CUDA 13."
    )


@pytest.mark.parametrize(
    ("built", "here"),
    [(None, "13.0"), (None, None), ("12.8", None), ("13.0", "13.2"), ("12.8", "12.6")],
)
def test_compatible_cuda_versions_do_not_warn(
    monkeypatch: pytest.MonkeyPatch, built: str | None, here: str | None
) -> None:
    assert warned(monkeypatch, built, here) == []


# --- TF32 on a GPU -------------------------------------------------------------------------------


@pytest.fixture
def restored_precision() -> Iterator[None]:
    """Sets cuDNN's default. The older setting changes both switches at once."""
    cudnn: Any = torch.backends.cudnn
    allowed = cudnn.allow_tf32
    before = cudnn.conv.fp32_precision, cudnn.rnn.fp32_precision
    cudnn.allow_tf32 = True
    yield
    cudnn.allow_tf32 = allowed  # sets a separate flag as well
    cudnn.conv.fp32_precision, cudnn.rnn.fp32_precision = before


@pytest.mark.usefixtures("restored_precision")
def test_cpp_reads_cudnns_tf32_switch() -> None:
    """Calls the function at the address that C++ gets. The switch of matmul has no effect."""
    ask = ctypes.CFUNCTYPE(ctypes.c_int)(_library._tf32_address())
    assert ask() == 1  # cuDNN's default
    torch.backends.cudnn.allow_tf32 = False
    assert ask() == 0
    torch.backends.cuda.matmul.allow_tf32 = True
    assert ask() == 0
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.rnn.fp32_precision = "tf32"
    assert ask() == 1
    torch.backends.cudnn.rnn.fp32_precision = "ieee"
    assert ask() == 0

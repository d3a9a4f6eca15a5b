"""The build: its recorded facts, the choice of torch by the backend, one-line errors."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

import fastrnn
from fastrnn import _C

ROOT = Path(__file__).resolve().parents[2]


def test_version_is_the_same_everywhere() -> None:
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert f'\nversion = "{fastrnn.__version__}"\n' in project
    assert fastrnn.__version__ == _C.build_info()["version"]


def test_installed_version_matches() -> None:
    try:
        installed = importlib.metadata.version("fastrnn")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("built in place, not installed")
    assert installed == fastrnn.__version__


def test_build_info_is_consistent() -> None:
    info = _C.build_info()
    assert re.match(r"(gcc|clang) \d+", info["compiler"])
    built_against = [int(n) for n in info["torch_built_against"].split(".")[:2]]
    assert built_against >= [2, 11]
    assert info["isas"][0] == "baseline"
    assert set(_C.available_isas()) <= set(info["isas"])
    assert _C.cpu_capability() in _C.available_isas()
    assert info["cuda"] == (info["cuda_version"] is not None) == bool(info["cuda_archs"])
    assert all(re.fullmatch(r"(sm|compute)_\d+a?", arch) for arch in info["cuda_archs"])


def test_stub_lists_every_function_of_the_module() -> None:
    stub = (ROOT / "fastrnn" / "_C.pyi").read_text(encoding="utf-8")
    typed = set(re.findall(r"^def (\w+)\(", stub, re.MULTILINE))
    assert typed == {name for name in dir(_C) if not name.startswith("_")}


@pytest.fixture
def backend() -> ModuleType:
    pytest.importorskip("setuptools")
    spec = importlib.util.spec_from_file_location(
        "backend_under_test", ROOT / "build_backend" / "backend.py"
    )
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def install_torch(folder: Path, version: str) -> None:
    """Creates the header folder and the metadata by which the backend recognises torch."""
    (folder / "torch" / "include").mkdir(parents=True)
    metadata = folder / f"torch-{version}.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: torch\nVersion: {version}\n")


@pytest.mark.parametrize("version", ["2.11.0", "2.13.0+cpu", "2.14.1+cu130", "3.0.0a0"])
def test_installed_torch_is_used(
    backend: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, version: str
) -> None:
    monkeypatch.setattr(backend, "package_folders", lambda: [str(tmp_path)])
    monkeypatch.setattr(sys, "path", list(sys.path))
    install_torch(tmp_path, version)
    assert backend.get_requires_for_build_wheel() == []
    assert backend.get_requires_for_build_editable() == []
    backend._use_installed_torch()
    assert sys.path[-1] == str(tmp_path)


@pytest.mark.parametrize("version", [None, "2.9.1", "1.13.1"])
def test_missing_or_old_torch_is_required(
    backend: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, version: str | None
) -> None:
    monkeypatch.setattr(backend, "package_folders", lambda: [str(tmp_path)])
    monkeypatch.setattr(sys, "path", list(sys.path))
    if version is not None:
        install_torch(tmp_path, version)
    assert backend.get_requires_for_build_wheel() == ["torch>=2.11"]
    assert backend.get_requires_for_build_editable() == ["torch>=2.11"]
    assert backend.get_requires_for_build_sdist() == []
    backend._use_installed_torch()
    assert str(tmp_path) not in sys.path


def test_folder_of_this_torch_is_searched(backend: ModuleType) -> None:
    assert str(Path(torch.__file__).parents[1]) in backend.package_folders()


def setup_py(tmp_path: Path, torch_text: str, **environment: str) -> str:
    """Runs setup.py, which must fail before it builds, and returns its error output.

    `torch_text` is the content of a fake torch/__init__.py. The build tools are fakes too.
    """
    for name, text in (("torch", torch_text), ("pybind11", ""), ("ninja", "BIN_DIR = '/'")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text(text)
    result = subprocess.run(
        [sys.executable, "setup.py", "build_ext", "--build-lib", str(tmp_path / "lib")],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(tmp_path), **environment},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert result.returncode == 1
    assert "Traceback" not in result.stderr
    return result.stderr.strip()


FAKE_TORCH = """
__version__ = {version!r}
class version:
    cuda = {cuda!r}
"""
CPU_TORCH = FAKE_TORCH.format(version="2.13.0+cpu", cuda=None)
CUDA_TORCH = FAKE_TORCH.format(version="2.14.1+cu130", cuda="13.0")


@pytest.mark.parametrize(
    ("torch_text", "environment", "message"),
    [
        ("raise ImportError('none')", {}, "torch >= 2.11 is not installed for "),
        (FAKE_TORCH.format(version="2.9.1", cuda=None), {}, "must be 2.11 or newer, got 2.9.1."),
        (CPU_TORCH, {"CXX": "no-such-c++ -O1"}, "the C++ compiler 'no-such-c++' is missing; "),
        (CPU_TORCH, {"FASTRNN_CUDA": "yes"}, "FASTRNN_CUDA must be 0 or 1, got 'yes'."),
        (CPU_TORCH, {"FASTRNN_CUDA": "1"}, "but torch 2.13.0+cpu is a build without CUDA."),
    ],
    ids=["no torch", "old torch", "no compiler", "FASTRNN_CUDA", "CPU torch"],
)
def test_missing_requirement_is_a_one_line_error(
    tmp_path: Path, torch_text: str, environment: dict[str, str], message: str
) -> None:
    pytest.importorskip("setuptools")
    error = setup_py(tmp_path, torch_text, **{"CXX": "true", "FASTRNN_CUDA": ""} | environment)
    assert error.startswith("fastrnn cannot be built: ")
    assert message in error
    assert "\n" not in error


@pytest.mark.parametrize(
    ("nvcc", "message"),
    [
        ("echo release 12.4, V12.4.99", "is CUDA 12.4 and torch was built for CUDA 13.0."),
        ("echo hello", "--version does not print a version."),
        ("echo release 13.0", "cuda_runtime.h is neither in the CUDA toolkit "),
    ],
    ids=["other CUDA", "broken nvcc", "no headers"],
)
def test_unusable_cuda_is_a_one_line_error(tmp_path: Path, nvcc: str, message: str) -> None:
    pytest.importorskip("setuptools")
    home = tmp_path / "cuda"
    (home / "bin").mkdir(parents=True)
    (home / "bin" / "nvcc").write_text(f"#!/bin/sh\n{nvcc}\n")
    (home / "bin" / "nvcc").chmod(0o755)
    error = setup_py(tmp_path, CUDA_TORCH, CXX="true", FASTRNN_CUDA="1", CUDA_HOME=str(home))
    expected = "fastrnn cannot be built: FASTRNN_CUDA=1 requires the CUDA kernels, but"
    assert error.startswith(expected)
    assert message in error
    assert "\n" not in error


def test_version_needs_no_torch(tmp_path: Path) -> None:
    pytest.importorskip("setuptools")
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").write_text("raise ImportError('not for metadata')")
    result = subprocess.run(
        [sys.executable, "setup.py", "--version"],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.stdout.strip().splitlines()[-1] == fastrnn.__version__

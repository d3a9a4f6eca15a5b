"""The files for developers agree with each other and with the code that they name."""

from __future__ import annotations

import configparser
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

import fastrnn

yaml = pytest.importorskip("yaml")
tomllib = pytest.importorskip("tomllib", reason="Python 3.11")

ROOT = Path(__file__).resolve().parents[2]
RUN = ROOT / ".ci" / "run"
pytestmark = pytest.mark.skipif(not RUN.exists(), reason="source archives have no .ci")

YAML = sorted(
    path.relative_to(ROOT).as_posix()
    for path in [
        *ROOT.glob(".github/**/*.yml"),
        *ROOT.glob(".*.yaml"),
        ROOT / "CITATION.cff",
    ]
)
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def load(path: str) -> dict:
    return yaml.safe_load((ROOT / path).read_text(encoding="utf-8"))


def listed_steps() -> list[str]:
    listing = subprocess.run([str(RUN), "--list"], capture_output=True, text=True, check=True)
    return [line.partition(":")[0] for line in listing.stdout.splitlines()]


def test_every_step_of_the_ci_is_a_function() -> None:
    functions = re.findall(r"^(\w+)\(\) [({]$", RUN.read_text(encoding="utf-8"), re.MULTILINE)
    steps = listed_steps()
    assert len(steps) == len(set(steps)) >= 15
    assert set(steps) <= set(functions)


def test_unknown_step_is_rejected() -> None:
    result = subprocess.run([str(RUN), "lint", "lin"], capture_output=True, text=True, check=False)
    assert result.returncode == 2
    assert "usage: .ci/run [--list | STEP...]" in result.stderr
    assert result.stdout == ""


@pytest.mark.parametrize("path", YAML)
def test_yaml_is_valid(path: str) -> None:
    assert isinstance(load(path), dict)


def test_workflows_name_steps_that_exist() -> None:
    jobs = load(".github/workflows/ci.yml")["jobs"]
    assert [step["run"] for step in jobs["all"]["steps"] if "run" in step][-1] == ".ci/run"
    assert set(jobs["quick"]["strategy"]["matrix"]["step"]) <= set(listed_steps())


def test_nox_sessions_are_documented() -> None:
    text = (ROOT / "noxfile.py").read_text(encoding="utf-8")
    sessions = re.findall(r"@nox\.session\ndef (\w+)\(.*\n    \"\"\"(.+)\"\"\"", text)
    assert {name for name, _ in sessions} == {
        *("build", "test", "test_fast", "lint", "format", "docs", "bench", "sanitize", "clangd")
    }
    assert text.count("@nox.session") == len(sessions)


def test_files_named_by_nox_and_by_the_wheels_exist() -> None:
    texts = (ROOT / "noxfile.py").read_text(encoding="utf-8")
    texts += PROJECT["tool"]["cibuildwheel"]["test-command"]
    named = set(re.findall(r"(?:\.ci|tests)/[\w/]+(?:\.py)?", texts)) - {"tests/"}
    assert {".ci/sanitize.py", ".ci/check_wheel.py"} <= named
    assert all((ROOT / name).exists() for name in named)


def test_wheels_are_built_for_every_supported_python() -> None:
    classifiers = " ".join(PROJECT["project"]["classifiers"])
    versions = re.findall(r"Python :: 3\.(\d+)", classifiers)
    built = re.findall(r"cp3(\d+)-\*", PROJECT["tool"]["cibuildwheel"]["build"])
    assert built == versions


def test_line_lengths_agree() -> None:
    expected = str(PROJECT["tool"]["ruff"]["line-length"])
    editor = configparser.ConfigParser()
    editor.read_string("[top]\n" + (ROOT / ".editorconfig").read_text(encoding="utf-8"))
    found = [
        section["max_line_length"] for section in editor.values() if "max_line_length" in section
    ]
    assert found == [expected, expected]
    assert f"\nColumnLimit: {expected}\n" in (ROOT / ".clang-format").read_text(encoding="utf-8")
    assert load(".yamllint.yaml")["rules"]["line-length"]["max"] == int(expected)


def test_hooks_of_pre_commit_are_those_of_lint() -> None:
    hooks = [
        h["entry"].split() for r in load(".pre-commit-config.yaml")["repos"] for h in r["hooks"]
    ]
    lint = (ROOT / ".ci" / "lint").read_text(encoding="utf-8")
    commands = re.findall(
        r"^(?:.*xargs (?:-0 )?)?(ruff \w+|python \S+|[a-z-]+)\b", lint.partition("\n\n")[2], re.M
    )
    named = {" ".join(hook[:2]) if hook[0] in ("ruff", "python") else hook[0] for hook in hooks}
    assert named == set(commands)


def test_citation_has_the_version_and_license() -> None:
    citation = load("CITATION.cff")
    assert citation["version"] == fastrnn.__version__
    assert citation["license"] == PROJECT["project"]["license"]
    authors = [author["name"] for author in PROJECT["project"]["authors"]]
    assert [author["name"] for author in citation["authors"]] == authors


def test_check_of_a_wheel_passes() -> None:
    script = ROOT / ".ci" / "check_wheel.py"
    result = subprocess.run(
        [sys.executable, str(script)], capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("agrees with torch.nn") == 3


def test_compilation_database_has_every_source(tmp_path: Path) -> None:
    pytest.importorskip("setuptools")
    pytest.importorskip("pybind11")
    script = ROOT / ".ci" / "compile.py"
    command = [sys.executable, str(script), "database", "--out", str(tmp_path)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    entries = json.loads((tmp_path / "compile_commands.json").read_text())
    found = {entry["file"] for entry in entries}
    expected = {
        path.relative_to(ROOT).as_posix()
        for pattern in ("csrc/cpu/**/*.cpp", "csrc/torch/ops.cpp", "csrc/**/*.h", "tests/**/*.cpp")
        for path in ROOT.glob(pattern)
    }
    assert len(expected) > 40
    assert expected <= found

"""The prose check finds its phrases in prose, and only there."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / ".ci" / "check_prose.py"
pytestmark = pytest.mark.skipif(not SCRIPT.exists(), reason="source archives have no .ci")


@pytest.fixture(scope="module")
def linter() -> ModuleType:
    spec = importlib.util.spec_from_file_location("check_prose_under_test", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    "line",
    [
        "Whoever comes next packs them anew.",
        "This is dearer at best.",
        "It costs 60 ns a step.",
        "One barrier a step, 3 tiles a block.",
        "Some 12 GFLOP/s a core",
        "They are measured in turns.",
        "lest it be lost",
        "``nn.LSTM`` and its like are left alone.",
        "Nobody waits.",
    ],
)
def test_phrases_are_found(linter: ModuleType, line: str) -> None:
    assert len(linter.check("page.md", f"A title\n\n{line}\n")) >= 1


@pytest.mark.parametrize(
    "line",
    [
        "It costs 60 ns per step.",
        "Raise an error, give a name, take a step, say why; a word is a step.",
        "A call returns a tensor of 4 values; a block is 8 rows.",
        "The endeared reader",
        "one of a cell's gates",
    ],
)
def test_ordinary_english_is_not_found(linter: ModuleType, line: str) -> None:
    assert linter.check("page.md", line) == []


def test_findings_name_file_line_and_advice(linter: ModuleType) -> None:
    found = linter.check("docs/page.md", "fine\nstart anew\n")
    assert found == ['docs/page.md:2: "anew": again']


@pytest.mark.parametrize(
    ("path", "text", "lines"),
    [
        (
            "a.py",
            'x = "anew"  # anew\n\n\ndef f():\n    """Anew.\n\n    anew\n    """\n',
            [1, 5, 7],
        ),
        ("a.h", "int anew;  // anew\n/* one\n anew */\n", [1, 3]),
        ("a.md", "anew\n```\nanew\n```\nanew\n", [1, 5]),
        ("CHANGELOG.md", "# Changes\n\n## 2\nanew\n\n## 1\nanew\n", [4]),
        (".ci/run", "anew  # anew\nanew\n", [1]),
    ],
)
def test_only_prose_is_read(linter: ModuleType, path: str, text: str, lines: list[int]) -> None:
    assert [int(finding.split(":")[1]) for finding in linter.check(path, text)] == lines


@pytest.mark.parametrize("word", ["What", "Which", "Of"])
def test_docstrings_must_begin_with_a_verb_or_a_noun(linter: ModuleType, word: str) -> None:
    assert linter.check("a.py", f'"""{word} is left."""\n') == [
        f'a.py:1: "{word} ...": {linter.BEGINNING_ADVICE}'
    ]
    assert linter.check("a.py", f'"""{word} is left?"""\n') == []
    assert linter.check("a.py", f'"""{word}ever is left."""\n') == []


def test_marker_keeps_a_line(linter: ModuleType) -> None:
    assert linter.check("a.md", "anew <!-- prose: keep -->\n") == []


def test_generated_files_are_not_listed(linter: ModuleType) -> None:
    if not (SCRIPT.parents[1] / ".git").exists():
        pytest.skip("not a checkout")
    paths = linter.files()
    assert {"README.md", ".ci/run", ".ci/check_prose.py", "csrc/cpu/plan.h"} <= set(paths)
    assert not any(path.startswith("bench/results/") for path in paths)
    assert "docs/cuda_kernels.md" not in paths

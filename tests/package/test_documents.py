"""The examples in the documentation and in docstrings run, and links lead to files."""

from __future__ import annotations

import copy
import doctest
import pickle
import re
import textwrap
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.utils._pytree import tree_leaves

import fastrnn

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.rglob("*.md"))
#: pages for readers, whose relative links must lead to a file of the project
LINKED = [ROOT / "README.md", ROOT / "CHANGELOG.md", ROOT / "bench/results/README.md", *PAGES]
LINK = re.compile(r"\]\(([^)#\s]+)[^)]*\)")
#: every fenced Python block, including indented blocks in lists
BLOCK = re.compile(r"^( *)```python\n(.*?)^ *```", re.DOTALL | re.MULTILINE)
EXAMPLES = [
    pytest.param(textwrap.dedent(match[2]), id=f"{page.relative_to(DOCS)}-{number}")
    for page in PAGES
    for number, match in enumerate(BLOCK.finditer(page.read_text()))
]


@pytest.fixture(autouse=True)
def restored_switches() -> Iterator[None]:
    switches = (torch.backends.cudnn.rnn, torch.backends.cuda.matmul)
    before = [switch.fp32_precision for switch in switches]
    yield
    for switch, precision in zip(switches, before, strict=True):
        switch.fp32_precision = precision
    fastrnn.unpatch()


def test_there_are_examples() -> None:
    fences = sum(page.read_text().count("```python") for page in PAGES)
    assert len(EXAMPLES) == fences >= 5


@pytest.mark.skipif(not LINKED[0].exists(), reason="needs the source tree")
@pytest.mark.parametrize("page", LINKED, ids=lambda page: str(page.relative_to(ROOT)))
def test_relative_links_lead_to_files(page: Path) -> None:
    links = [link for link in LINK.findall(page.read_text("utf-8")) if "://" not in link]
    assert [link for link in links if not (page.parent / link).exists()] == []


@pytest.mark.skipif(not LINKED[0].exists(), reason="needs the source tree")
def test_the_navigation_lists_every_page() -> None:
    listed = re.findall(r"^ *- .*: (\S+\.md)$", (ROOT / "mkdocs.yml").read_text(), re.MULTILINE)
    assert len(set(listed)) == len(listed)
    assert {DOCS / name for name in listed} >= set(PAGES)


@pytest.mark.parametrize("code", EXAMPLES)
def test_example_runs(code: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # examples write files
    for package in ("keras", "onnx"):  # optional
        if f"import {package}\n" in code:
            monkeypatch.setenv("KERAS_BACKEND", "torch")
            pytest.importorskip(package)
    if "define_cell" in code:  # to compile takes 10 seconds; tests/define does
        monkeypatch.setenv("CXX", "a-compiler-that-is-missing")
        monkeypatch.setenv("FASTRNN_CACHE", str(tmp_path))
    exec(compile(code, "an example", "exec"), {})


@pytest.mark.parametrize("module", [fastrnn, fastrnn.functional], ids=lambda m: m.__name__)
def test_docstring_example_runs(module: ModuleType) -> None:
    results = doctest.testmod(module)
    assert results.attempted > 0
    assert results.failed == 0


def test_class_checks_are_as_documented() -> None:
    """Checks what docs/differences.md states about `isinstance`, base classes and `patch`."""
    assert not isinstance(fastrnn.LSTM(3, 4), nn.LSTM)
    assert isinstance(fastrnn.LSTM(3, 4), nn.RNNBase)
    assert isinstance(fastrnn.LSTMCell(3, 4), nn.RNNCellBase)
    with fastrnn.patch():
        assert isinstance(nn.LSTM(3, 4), nn.LSTM)
        assert isinstance(nn.LSTM(3, 4), fastrnn.LSTM)


def test_stricter_calls_raise_as_documented() -> None:
    x, state = torch.randn(5, 2, 3), torch.zeros(2, 1, 2, 4)
    with pytest.raises(TypeError, match="hx"):
        fastrnn.LSTM(3, 4)(x, state)
    with pytest.raises(RuntimeError, match="hx"):
        fastrnn.RNNCell(3, 4)(torch.zeros(3), torch.zeros(4, 4))
    with pytest.raises(RuntimeError, match="dense"):
        fastrnn.GRU(3, 4)(x.to_sparse())
    assert nn.RNNCell(3, 4)(torch.zeros(3), torch.zeros(4, 4)).shape == (4, 4)


@pytest.mark.parametrize("name", ["RNN", "LSTM", "GRU"])
def test_types_under_autocast_match_torch(name: str) -> None:
    """Checks the types of the results on the CPU."""
    x = torch.randn(5, 2, 3)
    with torch.autocast("cpu", torch.bfloat16):
        ours, theirs = getattr(fastrnn, name)(3, 4)(x), getattr(nn, name)(3, 4)(x)
    assert [t.dtype for t in tree_leaves(ours)] == [t.dtype for t in tree_leaves(theirs)]


def test_permissive_calls_fail_in_torch_as_documented() -> None:
    """In-place changes and a missing bias raise in torch.nn and work here."""
    x = torch.randn(5, 2, 3)
    output, _ = nn.LSTM(3, 4)(x)
    with pytest.raises(RuntimeError, match="inplace"):
        functional.relu(output, inplace=True).sum().backward()
    layer = nn.GRU(3, 4)
    layer.bias_hh_l0 = None
    with pytest.raises(TypeError, match="NoneType"):
        layer(x)
    layer = fastrnn.GRU(3, 4)
    zeros = copy.deepcopy(layer)
    nn.init.zeros_(zeros.bias_hh_l0)
    layer.bias_hh_l0 = None
    torch.testing.assert_close(layer(x), zeros(x))


def test_whole_modules_need_fastrnn() -> None:
    assert b"fastrnn.modules" in pickle.dumps(fastrnn.convert(nn.LSTM(3, 4)))
    assert b"fastrnn" not in pickle.dumps(fastrnn.LSTM(3, 4).state_dict())

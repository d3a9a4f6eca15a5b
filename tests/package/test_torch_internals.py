"""torch's private names: all exist, and only fastrnn/_torch_internals.py uses them."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import fastrnn
from fastrnn import _torch_internals

PACKAGE = Path(fastrnn.__file__).parent
LIBRARY = [
    path
    for path in sorted(PACKAGE.rglob("*.py"))
    if "tools" not in path.parts and path.name != "_torch_internals.py"
]


@pytest.mark.parametrize("name", _torch_internals.__all__)
def test_name_exists(name: str) -> None:
    assert getattr(_torch_internals, name) is not None


def test_each_name_is_listed() -> None:
    public = {
        name
        for name in vars(_torch_internals)
        if not name.startswith("_") and name not in {"annotations", "Any", "Callable", "torch"}
    }
    assert public == set(_torch_internals.__all__)


def test_functions_return_the_expected_values() -> None:
    assert _torch_internals.forward_ad._current_level == -1
    assert not _torch_internals.is_any_autocast_enabled()
    with torch.autocast("cpu"):
        assert _torch_internals.is_any_autocast_enabled()
    assert not _torch_internals.are_transforms_active()
    inside: list[object] = []

    def look(x: torch.Tensor) -> torch.Tensor:
        inside.append(_torch_internals.are_transforms_active())
        inside.extend(i.key() for i in _torch_internals.interpreter_stack())
        return x.sum()

    torch.func.grad(look)(torch.ones(2))
    assert inside == [True, _torch_internals.TransformType.Grad]
    assert _torch_internals.dispatch_modes() == 0
    with FlopCounterMode(display=False):
        assert _torch_internals.dispatch_modes() == 1
    assert _torch_internals.has_kernel("fastrnn::recurrent_forward", "CPU")
    assert not _torch_internals.has_kernel("fastrnn::recurrent_forward", "XLA")
    x = torch.ones(2)
    clone = _torch_internals.lazy_clone(x)
    clone += 1
    assert x.tolist() == [1, 1]


@pytest.mark.parametrize("path", LIBRARY, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_no_other_module_uses_a_private_name(path: Path) -> None:
    names: list[str] = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names += [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Attribute):
            names.append(ast.unparse(node))
    allowed = ("torch._check", "torch.__")  # documented
    private = [name for name in names if re.match(r"torch\b.*\._", name)]
    assert not [name for name in private if not name.startswith(allowed)]

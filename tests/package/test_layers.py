"""Layers of the architecture: no #include or import may lead to a higher or neighbouring layer.

cells <- problem <- { cpu | cuda } <- { torch | bindings | c } <- Python
Python: init, ops <- backends, session <- engine <- functional, modules <- convert, interchange,
        quantization, tbptt <- diagnostics, tools
"""

from __future__ import annotations

import ast
import re
import sys
from pathlib import Path, PurePosixPath

import pytest

ROOT = Path(__file__).resolve().parents[2]
CSRC = ROOT / "csrc"
PACKAGE = ROOT / "fastrnn"

# For each part of csrc/, the parts that its files may include.
MAY_INCLUDE = {
    "cells": {"cells"},
    "problem": {"problem", "cells"},
    "cpu": {"cpu", "problem", "cells"},
    "cuda": {"cuda", "problem", "cells"},
    "slots": set(),
    "torch": {"torch", "slots", "cpu", "problem", "cells"},
    "torch_cuda": {"torch", "torch_cuda", "slots", "cuda", "problem", "cells"},
    "c": {"c", "cpu", "problem", "cells"},
    "bindings": {"bindings", "slots", "cpu", "cuda", "problem", "cells"},
}

# External headers, besides those of C++ itself, that a part may include.
STABLE_TORCH = r"torch/csrc/stable/.+|torch/headeronly/.+|torch/csrc/inductor/aoti_torch/.+"
CUDA_TOOLKIT = r"cuda(_\w+)?\.h|cublas_v2\.h"
OUTSIDE = {
    "cpu": r"dlfcn\.h|pthread\.h|sched\.h|unistd\.h|sys/(mman|syscall)\.h|linux/futex\.h"
    r"|cpuid\.h|immintrin\.h",
    "cuda": CUDA_TOOLKIT,
    "c": r"fastrnn\.h",
    "torch": STABLE_TORCH,
    "torch_cuda": f"{STABLE_TORCH}|{CUDA_TOOLKIT}",
    "bindings": r"pybind11/.+|unistd\.h|sys/syscall\.h",
}
# Headers of C++ have no dot in their name. Cells are compiled for CUDA and for vector types, which
# support few of these headers.
CELLS_STANDARD = {"cmath", "cstdint", "cstring", "type_traits", "utility"}

# The packages and modules of fastrnn in order. An import may lead to the same group or to a group
# on an earlier line. Groups on the same line must not import each other.
PYTHON_ORDER = [
    {"_C"},
    {"_library", "_torch_internals", "c_interface"},
    {"spec", "tracing"},
    {"layer_call"},
    {"autocast", "checks", "init", "reference"},
    {"ops"},
    {"backends", "session"},
    {"engine"},
    {"cuda_session"},
    {"functional", "modules"},
    {"convert", "define", "explanation", "flops", "interchange", "quantization", "tbptt"},
    {"diagnostics"},
    {""},  # fastrnn itself, that is fastrnn/__init__.py
    {"tools"},
    {"__main__"},
]
TOOLS = {"tools", "__main__", "diagnostics"}
TOOL_PACKAGES = {
    *("matplotlib", "numpy", "rich", "safetensors"),
    *("onnx", "onnxruntime", "openvino"),
}

SOURCES = sorted(
    path.relative_to(CSRC).as_posix()
    for path in CSRC.rglob("*")
    if path.suffix in {".h", ".cpp", ".cu", ".cuh"}
)
MODULES = sorted(path.relative_to(PACKAGE).as_posix() for path in PACKAGE.rglob("*.py"))


def room_of(source: str) -> str:
    """Returns the part of csrc/ that a file (relative to csrc/) belongs to."""
    path = PurePosixPath(source)
    if len(path.parts) == 1:
        raise AssertionError(f"csrc/{source} belongs to no part of csrc/")
    room = path.parts[0]
    if source == "torch/slots.h":  # numbers and names that fastrnn._C exports
        return "slots"
    return "torch_cuda" if room == "torch" and "cuda" in path.stem else room


def includes(text: str) -> list[tuple[str, str]]:
    """Returns ('<' or '"', file name) for each #include of a text."""
    found = re.findall(r'^[ \t]*#[ \t]*include[ \t]*([<"])([^>"]+)[>"]', text, re.MULTILINE)
    return [(mark, name) for mark, name in found]


def wrong_include(source: str, mark: str, name: str, existing: set[str]) -> str:
    """Returns the error for one include of a file in csrc/, "" if it is allowed."""
    room = room_of(source)
    if mark == '"':
        if name not in existing:
            return f"{source}: {name} is not the path of a file below csrc/"
        if room_of(name) not in MAY_INCLUDE[room]:
            return f"{source} ({room}) must not include {name} ({room_of(name)})"
        return ""
    if re.fullmatch(OUTSIDE.get(room, r"$^"), name):
        return ""
    if re.fullmatch(r"[a-z_0-9]+", name) and (room != "cells" or name in CELLS_STANDARD):
        return ""
    return f"{source} ({room}) must not include <{name}>"


def group_of(module: str) -> str:
    """Returns "" for fastrnn and "modules" for fastrnn.modules.rnn."""
    return module.split(".")[1] if "." in module else ""


def rank(group: str) -> int:
    for position, groups in enumerate(PYTHON_ORDER):
        if group in groups:
            return position
    raise AssertionError(f"fastrnn.{group} has no place in PYTHON_ORDER")


def names_of(path: str) -> list[str]:
    """Returns ["fastrnn", "modules", "rnn"] for modules/rnn.py; __init__.py is its folder."""
    parts = ["fastrnn", *PurePosixPath(path).with_suffix("").parts]
    return parts[:-1] if parts[-1] == "__init__" else parts


def imports(path: str, text: str, groups: set[str]) -> list[str]:
    """Returns the absolute names of all modules that a Python file imports anywhere."""
    own = names_of(path)
    package = own if path.endswith("__init__.py") else own[:-1]
    found: list[str] = []
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) + 1 - node.level] if node.level else []
            module = ".".join([*above, *([node.module] if node.module else [])])
            if module == "fastrnn":  # `from fastrnn import ops` means fastrnn.ops
                names = [alias.name for alias in node.names]
                found += [f"fastrnn.{name}" if name in groups else "fastrnn" for name in names]
            else:
                found.append(module)
    return found


def wrong_import(path: str, module: str) -> str:
    """Returns the error for one import of a file of the package, "" if it is allowed."""
    own = group_of(".".join(names_of(path)))
    top = module.split(".")[0]
    if top == "fastrnn":
        target = group_of(module)
        if own == target or rank(target) < rank(own):
            return ""
        return f"fastrnn/{path} must not import {module}"
    if top in sys.stdlib_module_names or top == "torch":
        return ""
    if top in TOOL_PACKAGES and own in TOOLS:
        return ""
    if (own, top) == ("interchange", "onnx"):  # fastrnn.from_onnx
        return ""
    return f"fastrnn/{path} must not import {module}"


GROUPS = {group for groups in PYTHON_ORDER for group in groups}


def test_files_are_found() -> None:
    assert {"problem/layer.h", "bindings/module.cpp", "cells/registry.h"} <= set(SOURCES)
    assert {"__init__.py", "ops/operators.py", "functional.py"} <= set(MODULES)


@pytest.mark.parametrize("source", SOURCES)
def test_includes_point_down(source: str) -> None:
    text = (CSRC / source).read_text(encoding="utf-8")
    wrong = [wrong_include(source, *found, set(SOURCES)) for found in includes(text)]
    assert not any(wrong), "\n".join(filter(None, wrong))


@pytest.mark.parametrize("path", MODULES)
def test_imports_point_down(path: str) -> None:
    text = (PACKAGE / path).read_text(encoding="utf-8")
    wrong = [wrong_import(path, module) for module in imports(path, text, GROUPS)]
    assert not any(wrong), "\n".join(filter(None, wrong))


def test_every_part_of_the_package_has_a_place() -> None:
    for path in MODULES:
        rank(group_of(".".join(names_of(path))))


@pytest.mark.parametrize(
    ("source", "line"),
    [
        ("cells/lstm.h", '#include "problem/layer.h"'),
        ("cells/lstm.h", "#include <vector>"),
        ("problem/layer.h", '#include "cpu/api.h"'),
        ("cpu/call.cpp", '#include "cuda/api.h"'),
        ("cpu/kernels/schedule/forward.h", '  #  include "torch/arguments.h"'),
        ("cpu/call.cpp", "#include <torch/csrc/stable/tensor.h>"),
        ("cpu/call.cpp", "#include <omp.h>"),
        ("cuda/api.cu", '#include "cpu/api.h"'),
        ("cuda/api.cu", "#include <ATen/cuda/CUDAContext.h>"),
        ("torch/ops.cpp", '#include "cuda/api.h"'),
        ("torch/ops.cpp", "#include <ATen/ATen.h>"),
        ("torch/ops.cpp", "#include <torch/extension.h>"),
        ("torch/ops_cuda.cpp", '#include "cpu/api.h"'),
        ("bindings/module.cpp", "#include <torch/csrc/stable/tensor.h>"),
        ("c/api.cpp", '#include "torch/arguments.h"'),
        ("cpu/session.cpp", "#include <fastrnn.h>"),
        ("bindings/module.cpp", '#include "torch/arguments.h"'),
        ("torch/slots.h", '#include "torch/arguments.h"'),
    ],
)
def test_wrong_include_is_found(source: str, line: str) -> None:
    existing = {"problem/layer.h", "cpu/api.h", "cuda/api.h", "torch/arguments.h"}
    [(mark, name)] = includes(line)
    assert "must not include" in wrong_include(source, mark, name, existing)


@pytest.mark.parametrize(
    ("path", "line"),
    [
        ("ops/autograd.py", "from fastrnn import functional"),
        ("ops/autograd.py", "from .. import functional"),
        ("ops/autograd.py", "def late():\n    import fastrnn.modules.rnn"),
        ("reference.py", "from fastrnn.ops import kernel_layer"),
        ("backends/kernels.py", "from fastrnn.engine import choose"),
        ("engine/run.py", "from fastrnn.modules import LSTM"),
        ("functional.py", "from fastrnn.modules import LSTM"),
        ("functional.py", "import fastrnn"),
        ("modules/rnn.py", "from ..convert import patch"),
        ("modules/rnn.py", "import numpy as np"),
        ("convert.py", "from fastrnn.diagnostics import diagnose"),
        ("init.py", "import rich"),
        ("convert.py", "from fastrnn import LSTM"),
        ("convert.py", "from fastrnn.tools.cli import main"),
        ("tools/charlm/train.py", "import pandas"),
    ],
)
def test_wrong_import_is_found(path: str, line: str) -> None:
    [module] = imports(path, line, GROUPS)
    assert "must not import" in wrong_import(path, module)

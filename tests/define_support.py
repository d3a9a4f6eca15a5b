"""Helpers of the tests of layers of `fastrnn.define_cell`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from fastrnn.backends import composite
from fastrnn.define import library
from fastrnn.engine import choose
from fastrnn.spec import COMPILED

needs_compiler = pytest.mark.skipif(library.find_compiler() is None, reason="needs a C++ compiler")


def build(cls: Any, *sizes: int, dtype: torch.dtype = torch.float32, **options: Any) -> nn.Module:
    torch.manual_seed(17)
    module: nn.Module = cls(*sizes, dtype=dtype, **options)
    assert cls._spec.name in COMPILED
    return module


def by_composite(call: Callable[[], Any]) -> Any:
    with choose.override(composite):
        return call()


def gradients(module: nn.Module, x: Tensor, *args: Any, **options: Any) -> Any:
    x = x.detach().clone().requires_grad_()
    module.zero_grad()
    output, hidden = module(x, *args, **options)
    loss = sum((t.sin() * (1 + t)).sum() for t in tree_leaves((output, hidden)))
    loss.backward()
    found = {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}
    assert len(found) == len(list(module.parameters()))
    return {"output": output.detach(), "hidden": hidden, "x": x.grad, **found}


def states(cls: Any, *shape: int, dtype: torch.dtype = torch.float32) -> Any:
    found = tuple([torch.rand(*shape, dtype=dtype) for _ in cls.state_names])
    return found if len(found) > 1 else found[0]


def assert_same(ours: Any, theirs: Any) -> None:
    for one, other in zip(tree_leaves(ours), tree_leaves(theirs), strict=True):
        if isinstance(one, Tensor):
            torch.testing.assert_close(one, other)


def assert_same_as_composite(call: Callable[[], Any]) -> None:
    assert_same(call(), by_composite(call))

"""Trains one client in one way and saves the results: ``run.py CLIENT WAY FILE``.

A client is a file ``train_CLIENT.py`` in this folder with

    build() -> anything: creates the models
    roots(built) -> the modules to convert, if they exist before training
    train(built) -> (modules, results): the trained modules, and numbers by name

The ways:

    torch    fastrnn is never imported
    patch    ``fastrnn.patch()`` after the client's package is imported
    import   ``fastrnn.patch()`` before the client's package is imported
    convert  ``fastrnn.convert`` on the roots, after they are built

The file contains the location of torch, the classes of the recurrent modules by name, and the
results as float64 tensors.
"""

from __future__ import annotations

import importlib
import random
import sys
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import torch
from torch import nn

_BASES = (nn.RNNBase, nn.RNNCellBase)


def seed() -> None:
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002  the clients use it
    torch.manual_seed(0)


def recurrent_modules(modules: Iterable[nn.Module]) -> dict[str, list[str]]:
    """Returns the class and base classes of each recurrent module, by its name."""
    return {
        f"{index}.{name}": [f"{c.__module__}.{c.__qualname__}" for c in type(module).__mro__]
        for index, root in enumerate(modules)
        for name, module in root.named_modules()
        if isinstance(module, _BASES)
    }


def main(client: str, way: str, file: str) -> None:
    torch.set_num_threads(1)
    if way in ("torch", "patch", "convert"):
        package = importlib.import_module(f"train_{client}")
    if way != "torch":
        import fastrnn

        if way in ("patch", "import"):
            fastrnn.patch()
    if way == "import":
        package = importlib.import_module(f"train_{client}")
    seed()
    built = package.build()
    if way == "convert":
        for root in package.roots(built):
            fastrnn.convert(root)
    seed()
    modules, results = package.train(built)
    if way == "torch":
        assert "fastrnn" not in sys.modules
    found = {"modules": recurrent_modules(modules), "results": _tensors(results)}
    torch.save({"torch": torch.__file__, **found}, file)


def _tensors(results: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    return {
        name: torch.as_tensor(value).detach().double().clone() for name, value in results.items()
    }


if __name__ == "__main__":
    main(*sys.argv[1:])

"""Packages that use the recurrent layers of ``torch.nn`` train alike with and without fastrnn.

Each package is installed into its own environment, which sees the torch and fastrnn of this one,
and trained in several ways: see clients/run.py. ``docs/clients.md`` summarises the results.
"""

from __future__ import annotations

import os
import subprocess
import sysconfig
import venv
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from tolerance import error

import fastrnn

pytestmark = pytest.mark.slow

RUN = Path(__file__).parent / "clients" / "run.py"

# Relative to the largest value of each result. Both libraries compute in float32 with different
# orders of summation, and training amplifies the differences. docs/clients.md has measured values.
TOLERANCE = 1e-4


@dataclass(frozen=True)
class Client:
    """A package and the expected replacement of its recurrent modules.

    Attributes:
        requirements: pip requirements, in the tested versions.
        recurrent: number of recurrent modules in the models.
        replaced: number of modules that fastrnn replaces, for each way that works.
        unsupported: part of the error message, for each way that does not work.
    """

    requirements: tuple[str, ...]
    recurrent: int
    replaced: dict[str, int]
    unsupported: dict[str, str]


CLIENTS = {
    "skorch": Client(("skorch==1.4.0",), 2, {"patch": 2, "import": 2, "convert": 2}, {}),
    "sb3_contrib": Client(
        ("sb3-contrib==2.9.2", "gymnasium==1.4.0"), 2, {"patch": 2, "import": 2, "convert": 2}, {}
    ),
    # checks isinstance(module, nn.LSTM) in each call, which holds only while the patch is active
    "torchrl": Client(
        ("torchrl==0.14.1", "tensordict==0.14.3"),
        2,
        {"patch": 2, "import": 2},
        {"convert": "unexpected keyword argument 'mask'"},
    ),
    # its own layers do not derive from nn.RNNBase: the script describes the comparison
    "opacus": Client(("opacus==1.6.0",), 6, {"patch": 6, "import": 6}, {}),
    # its LSTM and GRU derive from the classes in torch.nn at the time of its import
    "pytorch_forecasting": Client(
        ("pytorch-forecasting==1.8.0", "lightning==2.6.6"),
        2,
        {"patch": 0, "import": 2, "convert": 0},
        {},
    ),
    # the estimator creates its model inside the training call, so there is none to convert before
    "gluonts": Client(("gluonts==0.17.0", "lightning==2.6.6"), 1, {"patch": 1, "import": 1}, {}),
    # imports one of three layers by ``from torch.nn import LSTM``
    "torch_geometric": Client(
        ("torch_geometric==2.8.1",), 3, {"patch": 2, "import": 3, "convert": 3}, {}
    ),
}
WAYS = [(name, way) for name, client in CLIENTS.items() for way in client.replaced]
UNSUPPORTED = [(name, way) for name, client in CLIENTS.items() for way in client.unsupported]


class Environment:
    """A virtual environment for the clients, with the results so far."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        venv.create(folder / "venv", with_pip=True)
        self._python = folder / "venv" / "bin" / "python"
        (packages,) = folder.glob("venv/lib/python*/site-packages")
        # Its own packages come first, then those of this environment, and fastrnn if it lies
        # elsewhere.
        shared = [
            str(Path(module.__file__).parents[1]) for module in (fastrnn, torch) if module.__file__
        ]
        shared += [sysconfig.get_path("purelib"), sysconfig.get_path("platlib")]
        (packages / "shared.pth").write_text("\n".join(dict.fromkeys(shared)) + "\n")
        self._constraints = folder / "constraints.txt"
        self._constraints.write_text(f"torch=={torch.__version__}\n")
        self._missing: dict[str, str] = {}
        self._without: dict[str, dict[str, Any]] = {}

    def install(self, name: str) -> None:
        """Installs a client, or skips the test if pip fails."""
        if name not in self._missing:
            command = ["-m", "pip", "install", "--quiet", "--retries", "1"]
            constraints = ["--constraint", str(self._constraints)]
            done = self.call(*command, *constraints, *CLIENTS[name].requirements)
            reason = done.stderr.strip().splitlines() or ["pip failed"]
            self._missing[name] = reason[-1] if done.returncode else ""
        if self._missing[name]:
            pytest.skip(f"{name} cannot be installed: {self._missing[name]}")

    def run(self, name: str, way: str) -> subprocess.CompletedProcess[str]:
        return self.call(str(RUN), name, way, str(self._folder / f"{name}-{way}.pt"))

    def results(self, name: str, way: str) -> dict[str, Any]:
        done = self.run(name, way)
        assert done.returncode == 0, done.stderr
        results: dict[str, Any] = torch.load(self._folder / f"{name}-{way}.pt")
        return results

    def without_fastrnn(self, name: str) -> dict[str, Any]:
        if name not in self._without:
            self._without[name] = self.results(name, "torch")
        return self._without[name]

    def call(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        # PYTHONPATH would take precedence over the packages of this environment
        environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
        return subprocess.run(
            [str(self._python), *arguments],
            cwd=self._folder,  # trainers leave checkpoints there
            env=environment,
            capture_output=True,
            text=True,
            timeout=600,
            check=False,
        )


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> Environment:
    return Environment(tmp_path_factory.mktemp("clients"))


def is_fastrnn(classes: list[str]) -> bool:
    return any(name.startswith("fastrnn.modules.") for name in classes)


def test_environment_has_this_torch_and_this_fastrnn(environment: Environment) -> None:
    code = "import torch, fastrnn; print(torch.__file__); print(fastrnn.__file__)"
    done = environment.call("-c", code)
    assert done.stdout.split() == [torch.__file__, fastrnn.__file__], done.stderr


@pytest.mark.parametrize(("name", "way"), WAYS)
def test_client_trains_alike(environment: Environment, name: str, way: str) -> None:
    client = CLIENTS[name]
    environment.install(name)
    without = environment.without_fastrnn(name)
    found = environment.results(name, way)
    assert found["torch"] == without["torch"] == torch.__file__
    modules = found["modules"]
    assert len(modules) == client.recurrent
    assert sum(map(is_fastrnn, modules.values())) == client.replaced[way], modules
    assert not any(map(is_fastrnn, without["modules"].values()))
    expected, results = without["results"], found["results"]
    assert results.keys() == expected.keys()
    for key, value in results.items():
        assert value.shape == expected[key].shape, key
    errors = {key: error(value, expected[key]) for key, value in results.items()}
    worst = max(errors, key=errors.__getitem__)
    print(f"{name}, {way}: {worst} differs by {errors[worst]:.1e}")
    assert errors[worst] <= TOLERANCE, f"{worst} differs by {errors[worst]:.3g}"


@pytest.mark.parametrize(("name", "way"), UNSUPPORTED)
def test_unsupported_way_raises(environment: Environment, name: str, way: str) -> None:
    environment.install(name)
    done = environment.run(name, way)
    assert done.returncode != 0
    assert CLIENTS[name].unsupported[way] in done.stderr

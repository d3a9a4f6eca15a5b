"""Training with several processes or replicas matches one module on the whole batch."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tolerance import assert_same_in_double
from torch import Tensor, nn
from torch.nn.parallel import replicate

import fastrnn

TESTS = Path(__file__).resolve().parents[1]
EXAMPLE = TESTS.parent / "examples" / "charlm_ddp.py"
LAYERS = ["RNN", "LSTM", "GRU"]
STEPS = ["RNNCell", "LSTMCell", "GRUCell"]

needs_gloo = pytest.mark.skipif(
    not (torch.distributed.is_available() and torch.distributed.is_gloo_available()),
    reason="this torch has no gloo",
)


def torchrun(processes: int, folder: Path, script: Path, *arguments: str) -> str:
    """Runs a script in several processes of this machine and returns their output.

    The working directory is ``folder``, because the source tree may hold the package without its
    compiled libraries.
    """
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone"),
        *("--nproc-per-node", str(processes), str(script), *arguments),
    ]
    done = subprocess.run(
        command,
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@needs_gloo
def test_ddp_and_fsdp_match_one_process(tmp_path: Path) -> None:
    """Runs all cases in one pair of processes, because starting takes longer than the cases."""
    printed = torchrun(2, tmp_path, TESTS / "parallel_script.py")
    expected = [
        f"same: {way}"
        for name in LAYERS
        for way in (
            f"ddp {name}",
            f"fsdp {name} reshard_after_forward=True",
            f"fsdp {name} reshard_after_forward=False",
        )
    ]
    assert [line for line in printed.splitlines() if line.startswith("same: ")] == expected


@needs_gloo
@pytest.mark.slow
def test_example_learns_alike_with_one_and_two_processes(tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("In a recurrent network the state of a step is what the next one sees.\n" * 60)
    options = ["--text", str(text), *"--hidden 16 --seq-length 8 --batch-size 8".split()]
    options += "--steps 40 --report-every 10 --lr 0.01".split()
    losses = []
    for processes in (1, 2):
        printed = torchrun(processes, tmp_path, EXAMPLE, *options)
        assert f"{processes} ranks x {8 // processes} streams" in printed
        found = re.findall(r"^step (\d+): (\S+) bits/char", printed, re.MULTILINE)
        assert [step for step, _ in found] == ["1", "10", "20", "30", "40"]
        losses.append([float(loss) for _, loss in found])
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-3, atol=0)
    assert losses[0][-1] < 0.8 * losses[0][0]


def test_example_outside_torchrun_names_torchrun(tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "RANK"}
    done = subprocess.run(
        [sys.executable, str(EXAMPLE)],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 1
    assert done.stderr == (
        "charlm_ddp.py must be started by torchrun; its first lines show the commands.\n"
    )


class TestReplicas:
    """`nn.DataParallel` creates one replica per GPU, whose weights are copies, not Parameters."""

    @pytest.fixture(autouse=True)
    def copies_on_the_cpu(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Replaces the broadcast to GPUs by copies. The rest of `replicate` is that of torch."""

        def broadcast(tensors: Any, devices: Any, detach: bool = False) -> list[list[Tensor]]:
            copies = [[t.clone() for t in tensors] for _ in devices]
            return [[t.detach() for t in own] for own in copies] if detach else copies

        namespace = sys.modules[replicate.__module__]
        monkeypatch.setattr(namespace, "_broadcast_coalesced_reshape", broadcast)

    @staticmethod
    def first(result: Any) -> Tensor:
        return result if isinstance(result, Tensor) else result[0]

    @pytest.mark.parametrize("name", [*LAYERS, *STEPS])
    def test_gradients_reach_the_module(self, name: str) -> None:
        module = getattr(fastrnn, name)(3, 4, dtype=torch.float64)
        twin = getattr(nn, name)(3, 4, dtype=torch.float64)
        twin.load_state_dict(module.state_dict())
        shape = (4, 3) if name in STEPS else (5, 4, 3)
        x = torch.randn(shape, dtype=torch.float64)
        batch = 0 if name in STEPS else 1
        replicas = replicate(module, [0, 1])
        assert all(type(replica) is type(module) for replica in replicas)
        halves = [
            self.first(replica(half))
            for replica, half in zip(replicas, x.chunk(2, batch), strict=True)
        ]
        output, expected = torch.cat(halves, batch), self.first(twin(x))
        assert_same_in_double(output, expected)
        output.square().sum().backward()
        expected.square().sum().backward()
        for own, other in zip(module.parameters(), twin.parameters(), strict=True):
            assert_same_in_double(own.grad, other.grad)

    @pytest.mark.parametrize("is_recorded", [True, False])
    @pytest.mark.parametrize("name", [*LAYERS, *STEPS])
    def test_each_replica_computes_with_its_own_weights(self, name: str, is_recorded: bool) -> None:
        module = getattr(fastrnn, name)(3, 4)
        x = torch.randn((4, 3) if name in STEPS else (5, 4, 3))
        with torch.set_grad_enabled(is_recorded):
            before = self.first(module(x))
            first, second = replicate(module, [0, 1])
            with torch.no_grad():
                for weight in second._former_parameters.values():
                    weight.zero_()
            assert torch.equal(self.first(first(x)), before)
            assert not self.first(second(x)).any()
            assert torch.equal(self.first(module(x)), before)

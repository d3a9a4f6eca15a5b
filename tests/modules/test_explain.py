"""`fastrnn.explain` and ``FASTRNN_VERBOSE``: the backend of a call, and why others are skipped."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from support import build, make_step, pack, run_python
from torch import Tensor, nn

import fastrnn
from fastrnn import _C
from fastrnn.backends import (
    captured,
    composite,
    kernels,
    onnx_node,
    stacked_kernels,
    torch_builtin,
    torch_step,
)
from fastrnn.engine import choose

X = (5, 2, 3)


def explained(module: nn.Module, *args: Any, recorded: bool = False) -> fastrnn.Explanation:
    with torch.set_grad_enabled(recorded):
        return fastrnn.explain(module, *args)


def test_kernels_have_a_plan_per_layer() -> None:
    found = explained(build("lstm", 3, 4, 2, bidirectional=True, proj_size=2), torch.randn(X))
    assert found.backend == kernels.NAME
    assert found.skipped[stacked_kernels.NAME] == "the layers are bidirectional"
    options: dict[str, Any] = {"directions": 2, "threads": torch.get_num_threads()}
    assert found.plans == [
        _C.plan("lstm", 5, 2, 3, 4, 2, **options, layers=2),
        _C.plan("lstm", 5, 2, 4, 4, 2, **options, layers=1),
    ]
    lines = str(found).splitlines()
    assert lines[0] == "lstm, 2 layer(s) on [5, 2, 3] float32 cpu: kernels"
    assert len(lines) == 1 + len(found.skipped) + 2


def test_recorded_gradients_change_the_backend() -> None:
    module = build("gru", 3, 4, 2)
    assert explained(module, torch.randn(X)).backend == stacked_kernels.NAME
    found = explained(module, torch.randn(X), recorded=True)
    assert found.backend == kernels.NAME
    assert found.skipped[stacked_kernels.NAME] == "a gradient is recorded"
    training = {"training": True, "threads": torch.get_num_threads()}
    assert found.plans[0] == _C.plan("gru", 5, 2, 3, 4, **training, layers=2)


def test_packed_sequences_have_plans() -> None:
    packed = pack(torch.randn(9, 3), [2, 4, 3], enforce_sorted=False)
    found = explained(build("gru", 3, 4), packed)
    assert found.call == "gru, 1 layer(s) on packed [9, 3] float32 cpu"
    assert found.plans == [_C.plan("gru", 4, 3, 3, 4, threads=torch.get_num_threads())]


def test_calls_that_torch_computes_are_named() -> None:
    wide = build("gru", 3, 4, dtype=torch.complex64)
    found = explained(wide, torch.randn(X, dtype=torch.complex64))
    assert found.backend == torch_builtin.NAME
    assert found.skipped[kernels.NAME] == "there are no kernels for complex64"
    assert not found.plans
    step = explained(make_step("rnn_tanh", 3, 4), torch.randn(2, 3))
    assert step.backend == torch_step.NAME
    assert step.call == "rnn_tanh, step on [2, 3] float32 cpu"
    assert explained(make_step("gru", 3, 4), torch.randn(2, 3)).backend == kernels.NAME
    sigmoid = build("rnn_sigmoid", 3, 4, dtype=torch.complex64)
    found = explained(sigmoid, torch.randn(X, dtype=torch.complex64))
    assert found.backend == composite.NAME
    assert found.skipped[torch_builtin.NAME] == "torch has no rnn_sigmoid"


def test_transforms_change_the_backend() -> None:
    module = build("gru", 3, 4)
    found: list[fastrnn.Explanation] = []

    def call(x: Tensor) -> Tensor:
        found.append(fastrnn.explain(module, x))
        return x

    torch.func.vmap(call)(torch.randn(6, *X))
    assert found[0].backend == composite.NAME
    assert "torch.func" in found[0].skipped[kernels.NAME]


def test_autocast_changes_the_backend() -> None:
    module = build("lstm", 3, 4)
    with torch.autocast("cpu"):
        assert explained(module, torch.randn(X).bfloat16()).backend == kernels.NAME
        assert explained(module, torch.randn(1, 2, 3)).backend == kernels.NAME
        large = build("lstm", 300, 300)
        found = explained(large, torch.randn(1, 2, 300))
    assert found.backend == torch_step.NAME


def test_explain_neither_computes_nor_draws_random_numbers() -> None:
    module = build("lstm", 3, 4, 2, dropout=0.5)
    state = torch.get_rng_state()
    x = torch.randn(X)
    torch.set_rng_state(state)
    explained(module, x, recorded=True)
    assert torch.equal(torch.get_rng_state(), state)


def test_wrong_calls_raise_the_same_error() -> None:
    module = build("lstm", 3, 4)
    for wrong in (torch.randn(5, 2, 7), torch.randn(3), None):
        errors = []
        for call in (module, lambda x: fastrnn.explain(module, x)):
            with pytest.raises((RuntimeError, ValueError, TypeError)) as info:
                call(wrong)
            errors.append((info.type, str(info.value)))
        assert errors[0] == errors[1]
    with pytest.raises(TypeError, match=r"explain: module must be an RNN.*torch.*Linear"):
        fastrnn.explain(nn.Linear(3, 4), torch.randn(X))


def test_explained_backend_is_the_one_that_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[str] = []
    for backend in choose.PRIORITY:
        run = backend.run

        def counted(call: Any, backend: Any = backend, run: Callable[..., Any] = run) -> Any:
            ran.append(backend.NAME)
            return run(call)

        monkeypatch.setattr(backend, "run", counted)
    monkeypatch.setattr(choose, "may_use_fast_path", lambda: False)
    for module in (build("gru", 3, 4), build("lstm", 3, 4, 2), build("rnn_relu", 3, 4, 2).half()):
        x = torch.randn(X).to(next(module.parameters()).dtype)
        for recorded in (False, True):
            ran.clear()
            found = explained(module, x, recorded=recorded)
            assert not ran
            with torch.set_grad_enabled(recorded):
                module(x)
            assert set(ran) == {found.backend}


def test_captured_calls_use_the_operator() -> None:
    module = build("gru", 3, 4).requires_grad_(False)
    found: list[fastrnn.Explanation] = []

    def call(x: Tensor) -> Tensor:
        found.append(fastrnn.explain(module, x))
        return x + 1

    torch.jit.trace(call, torch.randn(X), check_trace=False)
    assert found[0].backend == captured.NAME
    assert onnx_node.NAME not in found[0].skipped  # comes later


CALLS = """
import torch, fastrnn
x = torch.randn(5, 2, 3)
fastrnn.LSTM(3, 4)(x)
with torch.no_grad():
    fastrnn.GRU(3, 4, 2)(x)
    fastrnn.RNNCell(3, 4)(x[0])
"""
REDIRECTED = f"""
import io, sys
sys.stderr = io.StringIO()
{CALLS}
print(sys.stderr.getvalue())
"""


def test_verbose_prints_each_choice() -> None:
    printed = run_python(REDIRECTED, FASTRNN_VERBOSE="1").splitlines()
    faster = "it is for half types, autocast and an RNN's single steps"
    prepared = "prepared weights: the weights are not prepared"
    assert printed == [
        "fastrnn: lstm, 1 layer(s) on [5, 2, 3] float32 cpu: kernels",
        f"fastrnn:   skipped torch's step: {faster}; {prepared}; "
        "stacked kernels: there is a single layer",
        "fastrnn: gru, 2 layer(s) on [5, 2, 3] float32 cpu: stacked kernels",
        f"fastrnn:   skipped torch's step: {faster}; {prepared}",
        "fastrnn: rnn_tanh, step on [2, 3] float32 cpu: torch's step",
    ]


@pytest.mark.parametrize("value", ["", "0"])
def test_nothing_is_printed_by_default(value: str) -> None:
    assert run_python(REDIRECTED, FASTRNN_VERBOSE=value) == ""


def test_override_also_replaces_the_fast_path_and_torchs_step() -> None:
    """A watcher disables the fast path of modules and the shortcut of `RNNCell`."""
    seen: list[str] = []

    class Counted:
        NAME = "counted"
        WHOLE_STACK = False

        def unsupported(self, call: Any, /) -> str:
            return "never asked"

        def run(self, call: Any, /) -> Any:
            seen.append(call.spec.name)
            return composite.run(call)

    with choose.override(Counted()), torch.no_grad():
        build("gru", 3, 4)(torch.randn(X))
        build("lstm", 3, 4, 2)(torch.randn(X))
        make_step("rnn_tanh", 3, 4)(torch.randn(2, 3))
    assert seen == ["gru", "lstm", "lstm", "rnn_tanh"]
    assert choose.may_use_fast_path is choose.is_plain


def test_autocast_on_the_cpu_gives_its_type_and_the_reason(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    module, x = fastrnn.LSTM(3, 4), torch.randn(20, 9, 3)
    with torch.autocast("cpu", torch.bfloat16):
        monkeypatch.setattr(_C, "bfloat16_copies", lambda cell, hidden, proj: (64, (1,)))
        found = explained(module, x)
        assert found.autocast == "bfloat16: copies make it faster"
        assert f"  autocast: {found.autocast}" in str(found).splitlines()
        assert " bfloat16 cpu" in found.call
        few = explained(module, x[:5])
        assert few.autocast == "float32: it is faster below 64 rows (steps times batch)"
        assert explained(module.bfloat16(), x.bfloat16()).autocast == ""
        monkeypatch.setattr(_C, "bfloat16_copies", lambda cell, hidden, proj: (64, ()))
        found = explained(module.float(), x)
        assert found.autocast == "float32: no instruction of this CPU multiplies pairs of bfloat16"
    assert explained(module, x).autocast == ""


def test_layers_that_are_linear_in_time() -> None:
    module, x = fastrnn.SRU(3, 3), torch.randn(X)
    found = explained(module, x)
    assert str(found) == "sru, 1 layer(s) of [5, 2, 9] float32 cpu after the product: scan kernels"
    with torch.autocast("cpu", torch.bfloat16):
        found = explained(module, x)
    assert found.backend == composite.NAME
    assert "autocast changes the type" in found.skipped["scan kernels"]
    reasons = []
    torch.func.vmap(lambda own: reasons.append(explained(module, own)) or own)(x.unsqueeze(0))
    assert reasons[0].skipped == {"scan kernels": "a transform of torch.func is active"}
    assert "_scan" not in vars(module)

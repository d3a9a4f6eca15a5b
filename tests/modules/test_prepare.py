"""`prepare`: results, which calls use the packed weights, and what drops them."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from support import CELLS, CountOps, build, exact_call, pack, run_python
from tolerance import assert_agrees
from torch import nn
from torch.func import functional_call
from torch.nn.utils import parametrizations
from torch.utils.flop_counter import FlopCounterMode

import fastrnn
from fastrnn import _C
from fastrnn.backends import prepared


@pytest.fixture(params=_C.available_isas())
def isa(request: pytest.FixtureRequest) -> Any:
    _C.set_isa(request.param)
    yield request.param
    _C.set_isa(None)


def uses_prepared(module: nn.Module, *args: Any) -> bool:
    return fastrnn.explain(module, *args).backend == prepared.NAME


def states_of(module: nn.Module, batch: int) -> Any:
    layers = module.num_layers * (2 if module.bidirectional else 1)
    dtype = next(module.parameters()).dtype
    h = torch.randn(layers, batch, module.proj_size or module.hidden_size, dtype=dtype)
    if not isinstance(module, fastrnn.LSTM):
        return h
    return h, torch.randn(layers, batch, module.hidden_size, dtype=dtype)


OPTIONS: list[dict[str, Any]] = [
    {},
    {"bidirectional": True, "num_layers": 2},
    {"num_layers": 3, "bias": False, "batch_first": True},
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("sizes", [(1, 1, 5, 7), (20, 1, 33, 70), (40, 3, 64, 64)], ids=str)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("cell", CELLS)
def test_prepared_calls_agree_with_the_module(
    isa: str, cell: str, options: dict[str, Any], sizes: tuple[int, ...], dtype: torch.dtype
) -> None:
    steps, batch, *widths = sizes
    plain = build(cell, *widths, **options, dtype=dtype).eval()
    module = copy.deepcopy(plain).prepare()
    x = torch.randn(steps, batch, widths[0], dtype=dtype)
    if plain.batch_first:
        x = x.transpose(0, 1).contiguous()
    with torch.no_grad():
        for hx in (None, states_of(module, batch)):
            assert uses_prepared(module, x, hx)
            assert not uses_prepared(plain, x, hx)
            ours = module(x, hx)
            assert_agrees(ours, plain(x, hx), exact_call(plain, x, hx))


def test_projection_agrees_with_the_module(isa: str) -> None:
    plain = build("lstm", 20, 50, num_layers=2, proj_size=30, bidirectional=True).eval()
    module, x = copy.deepcopy(plain).prepare(), torch.randn(15, 2, 20)
    with torch.no_grad():
        assert uses_prepared(module, x)
        assert_agrees(module(x), plain(x), exact_call(plain, x))


@pytest.fixture
def module() -> nn.Module:
    return build("lstm", 5, 7, num_layers=2).eval().prepare()


X = torch.randn(6, 2, 5)


def test_calls_that_the_copy_does_not_serve_run_as_before(module: nn.Module) -> None:
    plain = copy.deepcopy(module)
    packed = pack(torch.randn(6, 5), [1, 3, 2], False)
    with torch.no_grad():
        assert uses_prepared(module, X)
        assert not uses_prepared(module, packed)
        torch.testing.assert_close(module(packed)[0].data, plain(packed)[0].data)
        with torch.autocast("cpu", torch.bfloat16):
            assert not uses_prepared(module, X)
        module.weight_dtype = torch.float16
        assert not uses_prepared(module, X)
        module.weight_dtype = None
    assert "a gradient is recorded" in str(fastrnn.explain(module, X))
    module(X)[0].sum().backward()
    plain(X)[0].sum().backward()
    for ours, theirs in zip(module.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad)
    module.requires_grad_(False)
    assert uses_prepared(module, X)
    assert not uses_prepared(module, X.clone().requires_grad_())


def test_unbatched_input_uses_the_copy(module: nn.Module) -> None:
    plain = copy.deepcopy(module)
    with torch.no_grad():
        assert uses_prepared(module, X[:, 0])
        torch.testing.assert_close(module(X[:, 0])[0], plain(X[:, 0])[0])


def test_changes_in_place_do_not_show_until_prepare(module: nn.Module) -> None:
    with torch.no_grad():
        before = module(X)[0]
        module.weight_hh_l0.mul_(2)
        assert torch.equal(module(X)[0], before)
        module.prepare()
        expected = copy.deepcopy(module)(X)[0]
        torch.testing.assert_close(module(X)[0], expected)
        assert not torch.allclose(expected, before)


DROPS: dict[str, Callable[[Any], Any]] = {
    "unprepare": lambda m: m.unprepare(),
    "train": lambda m: m.train(),
    "load_state_dict": lambda m: m.load_state_dict(m.state_dict()),
    "to": lambda m: m.to(torch.float32),
    "half": lambda m: m.half().float(),
    "double": lambda m: m.double().float(),
    "share_memory": lambda m: m.share_memory(),
}


@pytest.mark.parametrize("name", DROPS)
def test_the_copy_is_dropped(module: nn.Module, name: str) -> None:
    DROPS[name](module)
    with torch.no_grad():
        assert not uses_prepared(module, X)
        assert "_prepared" not in module.__dict__


def test_eval_keeps_the_copy(module: nn.Module) -> None:
    with torch.no_grad():
        assert uses_prepared(module.eval(), X)


def test_other_parameters_do_not_use_the_copy(module: nn.Module) -> None:
    others = {name: 2 * p.detach() for name, p in module.named_parameters()}
    expected = copy.deepcopy(module)
    expected.load_state_dict(others)
    with torch.no_grad():
        torch.testing.assert_close(functional_call(module, others, (X,))[0], expected(X)[0])
        assert uses_prepared(module, X)
        module.weight_hh_l1 = nn.Parameter(others["weight_hh_l1"])
        assert fastrnn.explain(module, X).skipped[prepared.NAME] == "other weights were prepared"


def test_copies_pickles_and_state_dicts_have_no_copy(module: nn.Module) -> None:
    stored = io.BytesIO()
    torch.save(module, stored)
    stored.seek(0)
    copies = [
        copy.copy(module),
        copy.deepcopy(module),
        pickle.loads(pickle.dumps(module)),
        torch.load(stored, weights_only=False),
    ]
    with torch.no_grad():
        for other in copies:
            assert not uses_prepared(other, X)
        assert uses_prepared(module, X)
    assert set(module.state_dict()) == set(build("lstm", 5, 7, num_layers=2).state_dict())


def test_captured_code_ignores_the_copy(module: nn.Module) -> None:
    plain = copy.deepcopy(module)
    with torch.no_grad():
        expected = plain(X)[0]
        for captured in (
            torch.compile(module, backend="eager", fullgraph=True),
            torch.export.export(module, (X,)).module(),
            torch.jit.trace(module, (X,)),
            torch.jit.script(nn.Sequential(module)),
        ):
            torch.testing.assert_close(captured(X)[0], expected)
        # captured code follows the weights
        scripted = torch.jit.script(nn.Sequential(module))
        module.weight_hh_l0.mul_(2)
        assert not torch.allclose(scripted(X)[0], expected)


def test_modes_that_watch_operators_see_them(module: nn.Module) -> None:
    with torch.no_grad():
        with FlopCounterMode(display=False) as counter:
            module(X)
        assert counter.get_total_flops() > 0
        with CountOps() as ops:
            module(X)
        assert any("recurrent" in name for name in ops.counts)


def test_modules_that_cannot_be_prepared_are_rejected() -> None:
    for module, message in (
        (build("gru", 5, 7), r"GRU.prepare: the module must be in eval mode, got training mode"),
        (build("gru", 5, 7).eval().half(), "GRU.prepare: the weights must be float32 or float64"),
        (build("gru", 5, 7, device="meta").eval(), "GRU.prepare: the weights must be on the CPU"),
        (
            parametrizations.weight_norm(build("gru", 5, 7).eval(), "weight_hh_l0"),
            "all weights must be Parameters",
        ),
    ):
        with pytest.raises(RuntimeError, match=message):
            module.prepare()


def test_errors_are_those_of_the_module(module: nn.Module) -> None:
    plain = copy.deepcopy(module)
    h = torch.zeros(2, 2, 7)
    for args in (
        (torch.randn(6, 2, 4),),
        (X.double(),),
        (torch.randn(0, 2, 5),),
        (X, (h, h[:, :1])),
        (X, (h.double(), h)),
        (X, h),
        (X, (h,)),
        (None,),
    ):
        found = []
        for one in (module, plain):
            with torch.no_grad(), pytest.raises(Exception) as info:  # noqa: PT011 - compared below
                one(*args)
            found.append((type(info.value), str(info.value)))
        assert found[0] == found[1]


def test_prepared_calls_run_in_several_threads_and_forked_processes() -> None:
    code = """
import os, threading, torch, fastrnn
torch.manual_seed(0)
module, x = fastrnn.LSTM(200, 200).eval().prepare(), torch.randn(50, 1, 200)
found = []
def work():
    with torch.no_grad():
        for _ in range(20):
            found.append(module(x)[0])
threads = [threading.Thread(target=work) for _ in range(4)]
for thread in threads: thread.start()
for thread in threads: thread.join()
assert len(found) == 80 and all(torch.equal(y, found[0]) for y in found)
child = os.fork()
if child == 0:
    work()
    os._exit(0 if torch.equal(found[-1], found[0]) else 1)
assert os.waitpid(child, 0)[1] == 0
"""
    assert run_python(code) == ""

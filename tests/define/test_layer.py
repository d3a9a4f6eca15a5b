"""Layers of `fastrnn.define_cell`: compiled, from the cache, and without a compiler."""

from __future__ import annotations

import copy
import os
import pickle
import subprocess
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from define_support import (
    assert_same,
    assert_same_as_composite,
    build,
    by_composite,
    gradients,
    needs_compiler,
    states,
)
from defined_cells import Everything, MyGRU, MyLSTM, MySLSTM
from support import run_python
from tolerance import Change, assert_agrees, assert_same_in_double
from torch import Tensor
from torch.nn.utils.rnn import pack_padded_sequence
from torch.utils._pytree import tree_leaves

import fastrnn
from fastrnn import _C
from fastrnn.backends import composite, kernels
from fastrnn.define import library


@pytest.fixture
def forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes the library forget what it has tried, and the warnings."""
    monkeypatch.setattr(library, "_tried", {})
    monkeypatch.setattr(library, "_warned", set())


@needs_compiler
class TestEverything:
    """One cell that uses every function of the kernels: the one that the fast tests compile."""

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    @pytest.mark.parametrize(("batch", "hidden"), [(1, 5), (3, 40)])
    def test_results_and_gradients(self, dtype: torch.dtype, batch: int, hidden: int) -> None:
        module = build(Everything, 4, hidden, 2, bidirectional=True, dtype=dtype)
        x = torch.randn(6, batch, 4, dtype=dtype)
        hx = states(Everything, 4, batch, hidden, dtype=dtype)

        def exact(change: Change) -> Any:
            double = copy.deepcopy(module).double()
            with torch.no_grad():
                for own, other in zip(double.parameters(), module.parameters(), strict=True):
                    own.copy_(change(other))
            moved = tuple([change(state) for state in hx])
            return by_composite(lambda: gradients(double, change(x), moved))

        ours = gradients(module, x, hx)
        theirs = by_composite(lambda: gradients(module, x, hx))
        assert_agrees(ours, theirs, exact)

    def test_gradcheck(self) -> None:
        module = build(Everything, 2, 3, bidirectional=True, dtype=torch.float64)
        names, parameters = zip(*module.named_parameters(), strict=True)
        x = torch.randn(3, 2, 2, dtype=torch.float64, requires_grad=True)

        def call(x: Tensor, *values: Tensor) -> Any:
            named = dict(zip(names, values, strict=True))
            return tree_leaves(torch.func.functional_call(module, named, (x,)))

        assert torch.autograd.gradcheck(call, (x, *parameters))

    def test_second_derivative(self) -> None:
        module = build(Everything, 1, 2, dtype=torch.float64)
        x = torch.randn(2, 1, 1, dtype=torch.float64, requires_grad=True)
        assert torch.autograd.gradgradcheck(lambda x: module(x)[0], (x,))

    def test_kernels_run(self) -> None:
        module = build(Everything, 2, 3)
        assert fastrnn.explain(module, torch.randn(3, 1, 2)).backend == kernels.NAME

    def test_ways_to_call(self) -> None:
        module = build(Everything, 4, 6, 2, bidirectional=True, batch_first=True)
        x, hx = torch.randn(3, 5, 4), states(Everything, 4, 3, 6)
        lengths, resets = torch.tensor([5, 2, 3]), torch.rand(3, 5) > 0.6
        packed = pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
        calls: list[Callable[[], Any]] = [
            lambda: module(x, hx),
            lambda: module(x[0]),
            lambda: module(x, hx, lengths=lengths),
            lambda: module(x, hx, resets=resets, reset_state=hx),
            lambda: module(packed, hx),
        ]
        for call in calls:
            assert_same_as_composite(call)

    def test_copies(self) -> None:
        module = build(Everything, 4, 6)
        x = torch.randn(5, 2, 4)
        expected = module(x)[0]
        other = build(Everything, 4, 6)
        other.load_state_dict(module.state_dict())
        for same in (copy.deepcopy(module), pickle.loads(pickle.dumps(module)), other):
            assert torch.equal(same(x)[0], expected)
        assert [n for n in module.state_dict() if n.startswith("p_")] == ["p_l0"]

    def test_graphs(self) -> None:
        module = build(Everything, 4, 6, 2, bidirectional=True)
        x = torch.randn(5, 2, 4)
        compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
        expected = gradients(module, x)
        for name, value in gradients(compiled, x).items():
            key = name.removeprefix("_orig_mod.")
            assert_same(value, expected[key])
        exported = torch.export.export(module.eval(), (x,)).module()
        assert_same(exported(x), module(x))
        # in a process that has no layer of the class
        absent = "everything_0123456789ab"
        for node in exported.graph.nodes:
            node.args = tuple([absent if a == Everything._spec.name else a for a in node.args])
        exported.recompile()
        with pytest.raises(RuntimeError, match=f"'{absent}' .* Make a layer of its class first"):
            exported(x)

    def test_low_precision_and_autocast(self) -> None:
        module = build(Everything, 4, 6)
        x = torch.randn(5, 2, 4)
        with torch.autocast("cpu", torch.bfloat16):
            assert module(x)[0].dtype == torch.bfloat16
        module.bfloat16()
        assert_same_as_composite(lambda: module(x.bfloat16())[0].float().mul(64).round())

    def test_unsupported_requests(self) -> None:
        module = build(Everything, 4, 6).eval()
        for call in (module.prepare, module.stream):
            with pytest.raises(RuntimeError, match="must have no parameters per unit"):
                call()
        with pytest.raises(RuntimeError, match="cannot be scripted"):
            torch.jit.script(module)
        with pytest.raises(TypeError, match="hx must be a tuple of 2 tensors, h, c, got Tensor"):
            module(torch.randn(5, 2, 4), torch.zeros(1, 2, 6))
        with pytest.raises(RuntimeError, match="input_size"):
            module(torch.randn(5, 2, 3))
        with pytest.raises(ValueError, match="proj_size must be 0"):
            Everything(4, 6, proj_size=2)

    def test_instruction_set_without_its_kernels_is_an_error(self) -> None:
        module = build(Everything, 4, 6)
        x, before = torch.randn(5, 2, 4), _C.cpu_capability()
        others = [isa for isa in _C.available_isas() if isa != before]
        if not others:
            pytest.skip("needs two instruction sets")
        _C.set_isa(others[0])
        try:
            with pytest.raises(ValueError, match="was not compiled for the instruction set"):
                module(x)
        finally:
            _C.set_isa(before)
        assert module(x)[0].isfinite().all()

    def test_later_process_needs_no_compiler(self, cache: Path) -> None:
        build(Everything, 4, 6)
        output = run_python(
            f"""
import sys, time, torch
sys.path.insert(0, {str(Path(__file__).parents[1])!r})
from defined_cells import Everything
begin = time.perf_counter()
layer = Everything(4, 6)
print(time.perf_counter() - begin < 60)
import fastrnn
print(fastrnn.explain(layer, torch.randn(3, 1, 4)).backend)
""",
            CXX="a-compiler-that-is-missing",
            FASTRNN_CACHE=str(cache),
        )
        assert output.split() == ["True", kernels.NAME]


def test_cache_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FASTRNN_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/some/folder")
    assert library.cache_folder() == Path("/some/folder/fastrnn")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert library.cache_folder() == Path.home() / ".cache" / "fastrnn"
    monkeypatch.setenv("FASTRNN_CACHE", "~/cells")
    assert library.cache_folder() == Path.home() / "cells"


def test_headers_are_those_of_the_library() -> None:
    assert library.hash_of_headers(library.include_folder()) == _C.build_info()["headers"]


def make_cell(factor: float, name: str = "Scaled") -> Any:
    """Returns a cell that no other test has."""

    def step(gates_x: Any, gates_h: Any, h: Any) -> Any:
        return torch.tanh(gates_x[0] + gates_h[0]) * factor

    return fastrnn.define_cell(step, gates=1, name=name)


def assert_runs_by_composite(layer: Any) -> None:
    x = torch.randn(3, 2, 4, requires_grad=True)
    assert fastrnn.explain(layer, x).backend == composite.NAME
    layer(x)[0].sum().backward()
    assert x.grad is not None
    with torch.no_grad():
        layer(x, lengths=torch.tensor([3, 1]))
        layer(x, resets=torch.zeros(3, 2, dtype=torch.bool))
        with torch.autocast("cpu", torch.bfloat16):
            layer(x)


def test_without_a_compiler_there_is_one_warning(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, forgotten: None
) -> None:
    monkeypatch.setenv("CXX", "a-compiler-that-is-missing")
    monkeypatch.setenv("FASTRNN_CACHE", str(tmp_path))
    with pytest.warns(RuntimeWarning, match="there is no C\\+\\+ compiler") as caught:
        layers = [make_cell(0.25)(4, 5), make_cell(0.25)(4, 5), make_cell(0.125)(4, 5)]
    assert len(caught) == 1
    assert caught[0].filename == __file__
    for layer in layers:
        assert_runs_by_composite(layer)


@pytest.mark.parametrize("place", ["file", "unwritable"])
def test_unusable_cache_folder_is_a_warning(
    place: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, forgotten: None
) -> None:
    folder = tmp_path / "file"
    folder.write_text("")
    monkeypatch.setenv("FASTRNN_CACHE", str(folder if place == "file" else "/proc/cells"))
    with pytest.warns(RuntimeWarning, match="the cache folder .* is not usable"):
        layer = make_cell(0.5 if place == "file" else 0.75)(4, 5)
    assert_runs_by_composite(layer)


def test_noexec_cache_folder_is_one_warning(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, forgotten: None
) -> None:
    class Mounted:
        f_flag = os.ST_NOEXEC

    monkeypatch.setenv("FASTRNN_CACHE", str(tmp_path / "made" / "later"))
    monkeypatch.setattr(os, "statvfs", lambda path: Mounted())
    with pytest.warns(RuntimeWarning, match="mounted noexec, .*; set FASTRNN_CACHE") as caught:
        layers = [make_cell(0.375)(4, 5), make_cell(0.4375)(4, 5)]
    assert len(caught) == 1
    assert list(tmp_path.iterdir()) == []  # nothing was compiled
    for layer in layers:
        assert_runs_by_composite(layer)


def test_without_a_home_there_is_a_warning(
    monkeypatch: pytest.MonkeyPatch, forgotten: None
) -> None:
    def homeless() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("FASTRNN_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", homeless)
    with pytest.warns(RuntimeWarning, match="no home directory .*; set FASTRNN_CACHE"):
        layer = make_cell(0.0625)(4, 5)
    assert_runs_by_composite(layer)


@pytest.mark.parametrize("option", ["layer_norm", "zoneout", "recurrent_dropout"])
def test_options_that_change_the_cell_raise(option: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "load", lambda name, source: "not loaded")
    with pytest.raises(ValueError, match=f"^Scaled: a cell of define_cell .* got .*{option}"):
        make_cell(0.5)(4, 5, **{option: True if option == "layer_norm" else 0.5})


@needs_compiler
def test_failing_compiler_is_a_warning(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, forgotten: None
) -> None:
    compiler = tmp_path / "broken"
    compiler.write_text("#!/bin/sh\necho 'fatal error: no headers' >&2\nexit 1\n")
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    monkeypatch.setenv("FASTRNN_CACHE", str(tmp_path / "cache"))
    with pytest.warns(RuntimeWarning, match=r"broken failed \(fatal error: no headers\)"):
        layer = make_cell(1.5)(4, 5)
    assert_runs_by_composite(layer)
    assert list((tmp_path / "cache").glob("*.so")) == []


def test_other_headers_are_an_error(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, forgotten: None
) -> None:
    (tmp_path / "include" / "cells").mkdir(parents=True)
    monkeypatch.setenv("FASTRNN_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(library, "include_folder", lambda: tmp_path / "include")
    with pytest.raises(RuntimeError, match="must be those that fastrnn was compiled with"):
        make_cell(2.5)(4, 5)


@needs_compiler
def test_library_of_something_else_is_rejected(tmp_path: Path) -> None:
    def compiled(name: str, code: str) -> str:
        source, result = tmp_path / f"{name}.cpp", tmp_path / f"{name}.so"
        source.write_text(code)
        compiler = library.find_compiler()
        assert compiler is not None
        subprocess.run([*compiler, "-fPIC", "-shared", str(source), "-o", str(result)], check=True)
        return str(result)

    text = tmp_path / "text.so"
    text.write_text("not a library")
    with pytest.raises(ValueError, match="has no usable cell"):
        _C.add_defined_cell(str(text))
    with pytest.raises(ValueError, match="has no usable cell"):
        _C.add_defined_cell(str(tmp_path / "missing.so"))
    with pytest.raises(ValueError, match=r"was not compiled by fastrnn\.define_cell"):
        _C.add_defined_cell(compiled("other", "int value = 1;"))
    old = 'extern "C" { extern const char fastrnn_defined_cell_headers[] = "old"; '
    old += "extern const int fastrnn_defined_cell = 0; }"
    with pytest.raises(ValueError, match="was compiled against the headers old"):
        _C.add_defined_cell(compiled("old", old))
    assert not _C.has_defined_cell("old")


def test_base_class_has_no_cell() -> None:
    with pytest.raises(TypeError, match="define_cell makes the classes"):
        fastrnn.DefinedLayer(3, 4)


def test_cell_is_found_by_its_formulas() -> None:
    same, other = make_cell(0.25), make_cell(0.3)
    assert same._spec == make_cell(0.25)._spec
    assert same._spec.name != other._spec.name


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize(
    ("cls", "built_in"), [(MyLSTM, fastrnn.LSTM), (MyGRU, fastrnn.GRU)], ids=["lstm", "gru"]
)
def test_is_the_layer_of_fastrnn(cls: Any, built_in: Any) -> None:
    module = build(cls, 4, 40, 2, bidirectional=True, dtype=torch.float64)
    twin = built_in(4, 40, 2, bidirectional=True, dtype=torch.float64)
    twin.load_state_dict(module.state_dict())
    x = torch.randn(6, 3, 4, dtype=torch.float64)
    for name, value in gradients(module, x).items():
        assert_same_in_double(value, gradients(twin, x)[name])
    prepared, stream = copy.deepcopy(module).eval(), cls(4, 8).eval()
    assert_same(prepared.prepare()(x), module(x))
    assert_same(stream.stream().step(x[0, :1].float()), stream(x[:1, :1].float())[0][0])


@needs_compiler
@pytest.mark.slow
def test_four_states() -> None:
    module = build(MySLSTM, 4, 20, 2, bidirectional=True, dtype=torch.float64)
    x = torch.randn(6, 3, 4, dtype=torch.float64)
    hx = states(MySLSTM, 4, 3, 20, dtype=torch.float64)
    resets = torch.rand(6, 3) > 0.6
    for options in ({}, {"resets": resets, "reset_state": hx}):
        ours = gradients(module, x, hx, **options)
        theirs = by_composite(lambda o=options: gradients(module, x, hx, **o))
        assert_same_in_double(ours, theirs)
    assert len(module(x)[1]) == 4
    with pytest.raises(RuntimeError, match=r"Expected hidden\[0\] size"):
        module(x, tuple([state[..., :3] for state in hx]))
    with pytest.raises(ValueError, match="learn_initial_state must be False"):
        MySLSTM(4, 6, learn_initial_state=True)


@needs_compiler
@pytest.mark.slow
def test_processes_at_once_and_damaged_library(tmp_path: Path, forgotten: None) -> None:
    code = f"""
import sys
sys.path.insert(0, {str(Path(__file__).parents[1])!r})
from defined_cells import MyGRU
import torch, fastrnn
layer = MyGRU(4, 6)
print(fastrnn.explain(layer, torch.randn(3, 1, 4)).backend)
"""
    with ThreadPoolExecutor(3) as pool:
        outputs = list(pool.map(lambda _: run_python(code, FASTRNN_CACHE=str(tmp_path)), range(3)))
    assert outputs == [kernels.NAME] * 3
    (path,) = tmp_path.glob("*.so")
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    assert run_python(code, FASTRNN_CACHE=str(tmp_path)) == kernels.NAME
    assert len(path.read_bytes()) == len(whole)


@needs_compiler
@pytest.mark.slow
def test_examples(tmp_path: Path) -> None:
    path = Path(__file__).parents[2] / "examples" / "cells.py"
    if not path.exists():
        pytest.skip("needs the source tree")
    code = f"import runpy; runpy.run_path({str(path)!r}, run_name='__main__')"
    lines = run_python(code, FASTRNN_CACHE=str(tmp_path)).splitlines()
    names = ["LayerNormLSTM", "PeepholeLSTM", "LiGRU", "ATR", "JANET", "FastGRNN"]
    assert [line.partition(":")[0] for line in lines] == names


@needs_compiler
@pytest.mark.slow
def test_every_instruction_set(monkeypatch: pytest.MonkeyPatch) -> None:
    before = _C.cpu_capability()
    x = torch.randn(6, 3, 4, dtype=torch.float64)
    try:
        for isa in _C.available_isas():
            _C.set_isa(isa)
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                module = build(Everything, 4, 20, dtype=torch.float64)
            ours = gradients(module, x)
            theirs = by_composite(lambda module=module: gradients(module, x))
            assert_same_in_double(ours, theirs)
    finally:
        _C.set_isa(before)

"""The C interface: results, states, errors, and files that are damaged or hostile."""

from __future__ import annotations

import ctypes
import json
import re
import struct
import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from c_session import (
    ARGUMENT,
    BUSY,
    FILE,
    FORMAT,
    INTERNAL,
    LIBRARY,
    MEMORY,
    OK,
    CSession,
    OpenError,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from support import CELLS, build
from torch import nn

import fastrnn


def exported(module: nn.Module, folder: Path) -> Path:
    path = folder / "model.safetensors"
    module.stream().export(path)
    return path


def states(session: Any) -> list[torch.Tensor]:
    state = session.state
    return list(state) if isinstance(state, tuple) else [state]


@pytest.mark.parametrize(
    "shape",
    [
        {"input_size": 5, "hidden_size": 7},
        {"input_size": 3, "hidden_size": 40, "num_layers": 3, "bias": False},
    ],
    ids=str,
)
@pytest.mark.parametrize("cell", CELLS)
def test_results_are_those_of_python(cell: str, shape: dict[str, Any], tmp_path: Path) -> None:
    module = build(cell, **shape).eval()
    path = exported(module, tmp_path)
    x = torch.randn(150, 2, shape["input_size"])
    expected = module.stream(2)
    for model in (path, path.read_bytes()):
        expected.reset()
        with CSession(model, 2) as session:
            assert torch.equal(session.step(x[0]), expected.step(x[0]))
            assert torch.equal(session.run(x), expected.run(x))
            assert all(map(torch.equal, session.state(), states(expected)))


def test_projection_and_half_types(tmp_path: Path) -> None:
    module = build("lstm", 4, 30, num_layers=2, proj_size=9).eval()
    x = torch.randn(5, 1, 4)
    with CSession(exported(module, tmp_path)) as session:
        assert torch.equal(session.run(x), module.stream().run(x))
        assert session.size("output_size") == 9
        assert session.size("h_size") == 2 * 9
        assert session.size("c_size") == 2 * 30
    half = module.bfloat16()
    with CSession(exported(half, tmp_path)) as session:
        widened = build("lstm", 4, 30, num_layers=2, proj_size=9).eval()
        widened.load_state_dict(half.state_dict())
        assert torch.equal(session.run(x), widened.stream().run(x))


def test_states_can_be_read_set_and_reset(tmp_path: Path) -> None:
    module = build("lstm", 5, 7, num_layers=2).eval()
    x = torch.randn(6, 3, 5)
    with CSession(exported(module, tmp_path), 3) as session:
        first, middle = session.run(x), session.state()
        second = session.run(x)
        session.call("set_state", *(state.data_ptr() for state in middle))
        assert torch.equal(session.run(x), second)
        before = session.state()
        session.call("reset_row", 1)
        for old, new in zip(before, session.state(), strict=True):
            assert not new[:, 1].any()
            assert torch.equal(new[:, ::2], old[:, ::2])
        session.call("reset")
        assert torch.equal(session.run(x), first)


@pytest.mark.parametrize(
    ("cell", "options"),
    [
        ("rnn_tanh", {}),
        ("gru", {"num_layers": 3}),
        ("lstm", {"num_layers": 2, "proj_size": 3}),
        ("lstm", {"num_layers": 2, "residual": True}),
    ],
    ids=str,
)
def test_learned_initial_states_are_in_the_file(
    cell: str, options: dict[str, Any], tmp_path: Path
) -> None:
    module = build(cell, 5, 7, learn_initial_state=True, **options).eval()
    with torch.no_grad():
        for name in ("h_0", "c_0"):
            if hasattr(module, name):
                getattr(module, name).normal_()
    x = torch.randn(40, 3, 5)
    expected = module.stream(3)
    initial = states(expected)
    with CSession(exported(module, tmp_path), 3) as session:
        assert all(map(torch.equal, session.state(), initial))
        first = expected.run(x)
        assert torch.equal(session.run(x), first)
        before = session.state()
        session.call("reset_row", 1)
        for old, new, start in zip(before, session.state(), initial, strict=True):
            assert torch.equal(new[:, 1], start[:, 1])
            assert torch.equal(new[:, ::2], old[:, ::2])
        session.call("reset")
        assert all(map(torch.equal, session.state(), initial))
        assert torch.equal(session.run(x), first)


@pytest.mark.parametrize("cell", CELLS)
def test_residual_connections_are_in_the_file(cell: str, tmp_path: Path) -> None:
    module = build(cell, 5, 7, num_layers=3, residual=True).eval()
    x = torch.randn(150, 2, 5)
    path = exported(module, tmp_path)
    expected = module.stream(2)
    with CSession(path, 2) as session:
        assert torch.equal(session.step(x[0]), expected.step(x[0]))
        assert torch.equal(session.run(x), expected.run(x))
        assert all(map(torch.equal, session.state(), states(expected)))
    header, values = split(path.read_bytes())
    assert (header["__metadata__"]["fastrnn"], header["__metadata__"]["residual"]) == ("2", "true")
    header["__metadata__"].update(residual="false")
    with CSession(joined(header, values), 2) as session:
        plain = build(cell, 5, 7, num_layers=3).eval()
        plain.load_state_dict(module.state_dict())
        assert torch.equal(session.run(x), plain.stream(2).run(x))


def test_a_step_may_overwrite_its_input(tmp_path: Path) -> None:
    module = build("gru", 6, 6).eval()
    x = torch.randn(1, 6)
    expected = module.stream().step(x).clone()
    with CSession(exported(module, tmp_path)) as session:
        session.call("step", x.data_ptr(), x.data_ptr())
        assert torch.equal(x, expected)


def test_wrong_arguments_are_reported(tmp_path: Path) -> None:
    path = exported(build("gru", 5, 7).eval(), tmp_path)
    x, y = torch.zeros(4, 1, 5), torch.zeros(4, 1, 7)
    with CSession(path) as session:
        handle, at_x, at_y = session.handle, x.data_ptr(), y.data_ptr()
        for code in (
            LIBRARY.fastrnn_step(None, at_x, at_y),
            LIBRARY.fastrnn_step(handle, None, at_y),
            LIBRARY.fastrnn_step(handle, at_x, None),
            LIBRARY.fastrnn_run(handle, at_x, -1, at_y),
            LIBRARY.fastrnn_run(handle, at_x, 2**62, at_y),
            LIBRARY.fastrnn_run(handle, None, 1, at_y),
            LIBRARY.fastrnn_run(handle, at_x, 2, at_x + 4),
            LIBRARY.fastrnn_get_state(handle, None, None),
            LIBRARY.fastrnn_set_state(handle, None, None),
            LIBRARY.fastrnn_reset(None),
            LIBRARY.fastrnn_reset_row(handle, 1),
            LIBRARY.fastrnn_reset_row(handle, -1),
            LIBRARY.fastrnn_open(None, 1, ctypes.byref(ctypes.c_void_p())),
            LIBRARY.fastrnn_open(b"x", 1, None),
            LIBRARY.fastrnn_open_memory(None, 9, 1, ctypes.byref(ctypes.c_void_p())),
        ):
            assert code == ARGUMENT
        assert not torch.cat(session.state()).any()
        assert LIBRARY.fastrnn_run(handle, None, 0, None) == OK
    assert LIBRARY.fastrnn_batch(None) == 0
    LIBRARY.fastrnn_close(None)
    for batch in (0, -1, 65537, 2**62):
        with pytest.raises(OpenError, match="batch must be 1 to 65536"):
            CSession(path, batch)


def test_a_state_of_two_tensors_needs_both(tmp_path: Path) -> None:
    h = torch.zeros(1, 1, 7)
    with CSession(exported(build("lstm", 5, 7).eval(), tmp_path)) as session:
        assert LIBRARY.fastrnn_get_state(session.handle, h.data_ptr(), None) == ARGUMENT
        assert LIBRARY.fastrnn_set_state(session.handle, h.data_ptr(), None) == ARGUMENT


def test_files_that_cannot_be_read_are_reported(tmp_path: Path) -> None:
    (tmp_path / "empty").touch()
    for name, code, message in (
        ("missing", FILE, "cannot be opened"),
        ("", FILE, "not that of a file"),
        ("empty", FORMAT, "shorter than 8 bytes"),
    ):
        with pytest.raises(OpenError, match=message) as error:
            CSession(tmp_path / name)
        assert error.value.args[0] == code


def test_a_wrong_environment_variable_is_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = exported(build("gru", 5, 7).eval(), tmp_path)
    monkeypatch.setenv("FASTRNN_POISON", "maybe")
    with pytest.raises(OpenError, match="FASTRNN_POISON must be 0 or 1, got 'maybe'") as error:
        CSession(path)
    assert error.value.args[0] == INTERNAL


def test_too_little_memory_is_reported_without_torch(tmp_path: Path) -> None:
    """The process has neither torch nor room for a large batch."""
    path = exported(build("lstm", 8, 200, num_layers=3).eval(), tmp_path)
    code = f"""
import ctypes, resource, sys
library = ctypes.CDLL({fastrnn.get_library()!r})
resource.setrlimit(resource.RLIMIT_AS, (400 << 20, 400 << 20))
session = ctypes.c_void_p()
for batch in (65536, 1):
    where = ctypes.byref(session)
    print(library.fastrnn_open({str(path).encode()!r}, ctypes.c_int64(batch), where), bool(session))
assert "torch" not in sys.modules
"""
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.stdout.split() == [str(MEMORY), "False", str(OK), "True"], done.stderr


def test_calls_of_two_threads_never_mix(tmp_path: Path) -> None:
    path = exported(build("lstm", 64, 64).eval(), tmp_path)
    x = torch.randn(400, 1, 64)
    codes: list[int] = []
    with CSession(path) as session:

        def work() -> None:
            y = torch.empty(400, 1, 64)
            for _ in range(20):
                codes.append(LIBRARY.fastrnn_run(session.handle, x.data_ptr(), 400, y.data_ptr()))

        workers = [threading.Thread(target=work) for _ in range(3)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        found = session.state()
    assert set(codes) <= {OK, BUSY}
    with CSession(path) as session:
        for _ in range(codes.count(OK)):
            session.run(x)
        assert all(map(torch.equal, found, session.state()))


def test_header_has_the_version_and_the_codes() -> None:
    header = (Path(fastrnn.get_include()) / "fastrnn.h").read_text("utf-8")
    parts = re.findall(r"#define FASTRNN_VERSION_(?:MAJOR|MINOR|PATCH) (\d+)", header)
    assert ".".join(parts) == fastrnn.__version__
    major, minor, patch = map(int, parts)
    assert LIBRARY.fastrnn_version() == major * 10000 + minor * 100 + patch
    codes = re.findall(r"(FASTRNN_(?:OK|ERROR_\w+)) = (\d)", header)
    assert [int(code) for _, code in codes] == list(range(7))
    texts = {LIBRARY.fastrnn_error_string(code) for code in range(-1, 8)}
    assert len(texts) == 8
    declared = set(re.findall(r"\b(fastrnn_\w+)\(", header))
    assert len(declared) >= 19
    assert all(hasattr(LIBRARY, name) for name in declared)


def test_files_can_be_read_by_the_safetensors_package(tmp_path: Path) -> None:
    safetensors = pytest.importorskip("safetensors")
    module = build("lstm", 5, 7, num_layers=2, proj_size=3).eval()
    with safetensors.safe_open(exported(module, tmp_path), "pt") as file:
        metadata = file.metadata()
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    assert metadata["cell"] == "lstm"
    assert metadata["proj_size"] == "3"
    weights = module.state_dict()
    assert tensors.keys() == weights.keys()
    assert all(torch.equal(tensors[name], weights[name]) for name in weights)


def test_export_rejects_what_the_file_cannot_hold(tmp_path: Path) -> None:
    module = build("gru", 5, 7)
    session = module.stream()
    with torch.no_grad():
        module.weight_hh_l0.mul_(2)
    with pytest.raises(RuntimeError, match=r"^Session.export: .* have changed .* refresh\(\)"):
        session.export(tmp_path / "unused")
    with pytest.raises(RuntimeError, match=r"^Session.export: the weights must be float32, .*64"):
        module.double().stream().export(tmp_path / "unused")
    assert not (tmp_path / "unused").exists()


# Files that are damaged or hostile


def model_bytes(cell: str, **shape: Any) -> bytes:
    """The file of a small layer."""
    with tempfile.TemporaryDirectory() as folder:
        return exported(build(cell, 2, 3, **shape).eval(), Path(folder)).read_bytes()


MODELS = [
    model_bytes("lstm", num_layers=2, proj_size=2),
    model_bytes("gru", bias=False),
    model_bytes("lstm", num_layers=2, learn_initial_state=True, residual=True),
]


def split(model: bytes) -> tuple[dict[str, Any], bytes]:
    """Header and values of a file."""
    size = struct.unpack("<Q", model[:8])[0]
    return json.loads(model[8 : 8 + size]), model[8 + size :]


def joined(header: Any, values: bytes) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + values


def open_and_step(model: bytes) -> int:
    """Opens the file and, if that succeeds, runs two steps. Returns the error code."""
    try:
        with CSession(model, 2) as session:
            session.run(torch.zeros(2, 2, session.size("input_size")))
    except OpenError as error:
        code: int = error.args[0]
        return code
    return OK


def test_small_files_are_valid() -> None:
    assert {open_and_step(model) for model in MODELS} == {OK}


@pytest.mark.parametrize("model", MODELS, ids=["lstm", "gru", "options"])
def test_every_truncation_is_rejected(model: bytes) -> None:
    assert {open_and_step(model[:size]) for size in range(len(model))} == {FORMAT}


HEADER, VALUES = split(MODELS[1])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda h: h["__metadata__"].pop("cell"), "no cell"),
        (lambda h: h["__metadata__"].update(cell="slstm"), "invalid cell"),
        (lambda h: h["__metadata__"].update(fastrnn="3"), "another version"),
        (lambda h: h["__metadata__"].update(fastrnn="2"), "no residual"),
        (lambda h: h["__metadata__"].update(fastrnn="2", residual="1"), "invalid residual"),
        (lambda h: h.update(h_0=dict(h["weight_hh_l0"])), "h_0 does not have"),
        (lambda h: h.update(c_0=dict(h["weight_hh_l0"])), "does not: c_0"),
        (lambda h: h["__metadata__"].update(hidden_size="-3"), "invalid hidden_size"),
        (lambda h: h["__metadata__"].update(hidden_size="0"), "invalid hidden_size"),
        (lambda h: h["__metadata__"].update(hidden_size="99999999999999999999"), "invalid hidden"),
        (lambda h: h["__metadata__"].update(hidden_size="4"), "weight_ih_l0 does not have"),
        (lambda h: h["__metadata__"].update(num_layers="2"), "no weight_ih_l1"),
        (lambda h: h["__metadata__"].update(num_layers="16777215"), "no weight_ih_l1"),
        (lambda h: h["__metadata__"].update(proj_size="2"), "invalid proj_size"),
        (lambda h: h["__metadata__"].update(bias="true"), "no bias_ih_l0"),
        (lambda h: h["__metadata__"].update(bias="1"), "invalid bias"),
        (lambda h: h.pop("__metadata__"), "no fastrnn; write the file with"),
        (lambda h: h.update(other=h["weight_ih_l0"]), "a tensor that the cell does not: other"),
        (lambda h: h["weight_ih_l0"].update(dtype="F16"), "weight_ih_l0 must have the type F32"),
        (lambda h: h["weight_ih_l0"].update(shape=[2, 9]), "weight_ih_l0 does not have the shape"),
        (lambda h: h["weight_ih_l0"].update(shape=[1] * 9), "too many dimensions"),
        (lambda h: h["weight_ih_l0"].update(data_offsets=[1, 73]), "place of weight_ih_l0"),
        (lambda h: h["weight_ih_l0"].update(data_offsets=[72, 0]), "place of weight_ih_l0"),
        (lambda h: h["weight_ih_l0"].update(data_offsets=[2**60, 2**60 + 72]), "too large|place"),
        (lambda h: h["weight_ih_l0"].update(data_offsets=[0, 2**64]), "too large"),
        (lambda h: h["weight_ih_l0"].update(data_offsets=[-72, 0]), "no whole number"),
        (lambda h: h["weight_ih_l0"].update(data_offsets=[0.5, 72]), "syntax error"),
        (lambda h: h["weight_ih_l0"].update(data_offsets=[0, 72, 3]), "syntax error"),
        (lambda h: h["weight_ih_l0"].update(more=1), "unknown or repeated member"),
        (lambda h: h["weight_ih_l0"].pop("shape"), "without a type, shape or place"),
    ],
)
def test_wrong_headers_are_reported(change: Any, message: str) -> None:
    header, values = split(MODELS[1])
    change(header)
    with pytest.raises(OpenError, match=message) as error:
        CSession(joined(header, values))
    assert error.value.args[0] == FORMAT


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"", "syntax error"),
        (b"[]", "syntax error"),
        (b"{" * 100000, "syntax error"),
        (b'{"a', "text without end"),
        (b'{"\\', "text without end"),
        (b'{"\\u12', "text without end"),
        (b'{"\\q":1}', "unknown escape"),
        (b'{"\\u12g4":1}', "unknown escape"),
        (b'{"a\x01":1}', "control character"),
        (b'{"a": {"dtype": "F32", "shape": [01], "data_offsets": [0, 1]}}', "begins with 0"),
        (b'{"__metadata__": {}, "__metadata__": {}}', "__metadata__ twice"),
        (b'{"__metadata__": {"a": "b", "a": "b"}}', "a name twice"),
        (b'{"__metadata__": {"a": 1}}', "syntax error"),
        (b'{"a": {"dtype": "F32", "dtype": "F32"}}', "unknown or repeated member"),
        (b"{} x", "something after its end"),
        (
            b'{"\\u0041\\n\\"\\/": {"dtype": "F32", "shape": [], "data_offsets": [0, 0]}}',
            "no fastrnn",
        ),
    ],
    ids=lambda value: repr(value)[:30],
)
def test_wrong_json_is_reported(text: bytes, message: str) -> None:
    with pytest.raises(OpenError, match=message):
        CSession(joined(text, VALUES))
    size = 2**64 - 1
    with pytest.raises(OpenError, match="shorter than its header"):
        CSession(struct.pack("<Q", size) + text)


def test_a_header_of_more_than_a_megabyte_is_rejected() -> None:
    with pytest.raises(OpenError, match="larger than 1 MiB"):
        CSession(joined(b" " * (2**20 + 1), b""))


@given(st.sampled_from(MODELS), st.data())
@settings(max_examples=300, deadline=None)
def test_changed_bytes_never_crash(model: bytes, data: st.DataObject) -> None:
    changed = bytearray(model)
    size = struct.unpack("<Q", model[:8])[0]
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, 8 + size - 1))
        changed[at] = data.draw(st.integers(0, 255) | st.sampled_from(b'0129"\\{}[],: '))
    changed = changed[: data.draw(st.integers(len(model) - 9, len(model)))]
    assert open_and_step(bytes(changed)) in (OK, FORMAT)


NUMBERS = st.integers(0, 200) | st.integers(0, 2**66) | st.sampled_from([2**31, 2**32, 2**63])
TENSOR = st.fixed_dictionaries(
    {},
    optional={
        "dtype": st.sampled_from(["F32", "F64", "", "\n"]),
        "shape": st.lists(NUMBERS, max_size=3),
        "data_offsets": st.lists(NUMBERS, min_size=1, max_size=3),
    },
)
SIZE = st.sampled_from(["0", "1", "2", "3", "4", "16777215", "16777216", "", "x", "1e3"])


@given(st.data())
@settings(max_examples=300, deadline=None)
def test_changed_headers_never_crash(data: st.DataObject) -> None:
    header, values = split(data.draw(st.sampled_from(MODELS)))
    names = [name for name in header if name != "__metadata__"]
    for _ in range(data.draw(st.integers(1, 4))):
        name = data.draw(st.sampled_from(names))
        header.setdefault(name, {}).update(data.draw(TENSOR))
        size = data.draw(st.sampled_from(["input_size", "hidden_size", "num_layers", "proj_size"]))
        if data.draw(st.booleans()):
            header["__metadata__"][size] = data.draw(SIZE)
    assert open_and_step(joined(header, values)) in (OK, FORMAT)

"""The C interface, called through ctypes."""

from __future__ import annotations

import ctypes
from pathlib import Path

import torch
from torch import Tensor

import fastrnn

LIBRARY = ctypes.CDLL(fastrnn.get_library())

(OK, ARGUMENT, FILE, FORMAT, MEMORY, BUSY, INTERNAL) = range(7)

_Floats = ctypes.c_void_p
_Session = ctypes.c_void_p
_SIZES = ("batch", "input_size", "hidden_size", "output_size", "num_layers", "h_size", "c_size")
_SIGNATURES = {
    "version": (ctypes.c_int, []),
    "error_string": (ctypes.c_char_p, [ctypes.c_int]),
    "open": (ctypes.c_int, [ctypes.c_char_p, ctypes.c_int64, ctypes.POINTER(_Session)]),
    "open_memory": (
        ctypes.c_int,
        [ctypes.c_char_p, ctypes.c_size_t, ctypes.c_int64, ctypes.POINTER(_Session)],
    ),
    "open_message": (ctypes.c_char_p, []),
    "close": (None, [_Session]),
    "step": (ctypes.c_int, [_Session, _Floats, _Floats]),
    "run": (ctypes.c_int, [_Session, _Floats, ctypes.c_int64, _Floats]),
    "get_state": (ctypes.c_int, [_Session, _Floats, _Floats]),
    "set_state": (ctypes.c_int, [_Session, _Floats, _Floats]),
    "reset": (ctypes.c_int, [_Session]),
    "reset_row": (ctypes.c_int, [_Session, ctypes.c_int64]),
    **{name: (ctypes.c_int64, [_Session]) for name in _SIZES},
}
for _name, (_result, _arguments) in _SIGNATURES.items():
    _function = getattr(LIBRARY, f"fastrnn_{_name}")
    _function.restype, _function.argtypes = _result, _arguments


class OpenError(Exception):
    """A session cannot be opened. args: the code, and the message."""


class CSession:
    """A session of the C interface. Its errors are AssertionErrors with the code."""

    def __init__(self, model: Path | bytes, batch: int = 1) -> None:
        self.handle = _Session()
        where = ctypes.byref(self.handle)
        if isinstance(model, bytes):
            code = LIBRARY.fastrnn_open_memory(model, len(model), batch, where)
        else:
            code = LIBRARY.fastrnn_open(str(model).encode(), batch, where)
        message = LIBRARY.fastrnn_open_message().decode()
        if code != OK:
            assert not self.handle
            assert message.startswith("fastrnn: ")
            raise OpenError(code, message)
        assert message == ""

    def __enter__(self) -> CSession:
        return self

    def __exit__(self, *exception: object) -> None:
        LIBRARY.fastrnn_close(self.handle)

    def size(self, name: str) -> int:
        size: int = getattr(LIBRARY, f"fastrnn_{name}")(self.handle)
        return size

    def call(self, name: str, *arguments: object) -> None:
        code = getattr(LIBRARY, f"fastrnn_{name}")(self.handle, *arguments)
        assert code == OK, code

    def step(self, x: Tensor) -> Tensor:
        assert x.is_contiguous()
        y = torch.empty(self.size("batch"), self.size("output_size"))
        self.call("step", x.data_ptr(), y.data_ptr())
        return y

    def run(self, x: Tensor) -> Tensor:
        assert x.is_contiguous()
        y = torch.empty(len(x), self.size("batch"), self.size("output_size"))
        self.call("run", x.data_ptr(), len(x), y.data_ptr())
        return y

    def state(self) -> list[Tensor]:
        """h and, if the cell has it, c."""
        layers, batch = self.size("num_layers"), self.size("batch")
        h = torch.empty(layers, batch, self.size("output_size"))
        c = torch.empty(layers, batch, self.size("hidden_size"))
        has_c = self.size("c_size") > 0
        self.call("get_state", h.data_ptr(), c.data_ptr() if has_c else None)
        return [h, c] if has_c else [h]

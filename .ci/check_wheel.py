"""Runs every layer of the installed fastrnn once, forward and backward, and compares it with torch.
Checks that the header and the library of the C interface are installed.

For wheels on machines without the test tools: it imports only fastrnn and torch.
"""

from __future__ import annotations

import ctypes
import os
import tempfile
import warnings
from pathlib import Path

import torch

import fastrnn
from fastrnn import _C
from fastrnn.define import library

for name in ("RNN", "LSTM", "GRU"):
    torch.manual_seed(0)
    ours = getattr(fastrnn, name)(5, 33, num_layers=2, bidirectional=True)
    theirs = getattr(torch.nn, name)(5, 33, num_layers=2, bidirectional=True)
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(7, 3, 5)
    outputs = [module(x)[0] for module in (ours, theirs)]
    torch.testing.assert_close(*outputs, rtol=1e-4, atol=1e-5)
    for output in outputs:
        output.sum().backward()
    for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-3, atol=1e-4)
    print(f"{name} agrees with torch.nn.{name}")
assert (Path(fastrnn.get_include()) / "fastrnn.h").is_file()
assert ctypes.CDLL(fastrnn.get_library()).fastrnn_version() > 0
assert library.hash_of_headers(library.include_folder()) == _C.build_info()["headers"]
if library.find_compiler() is not None:

    @fastrnn.define_cell(gates=1)
    def Elman(gates_x, gates_h, h):
        return torch.tanh(gates_x[0] + gates_h[0])

    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("error")
        os.environ["FASTRNN_CACHE"] = folder
        layer = Elman(5, 33)
        x = torch.randn(7, 3, 5)
        assert fastrnn.explain(layer, x).backend == "kernels"
        twin = torch.nn.RNN(5, 33)
        twin.load_state_dict(layer.state_dict())
        torch.testing.assert_close(layer(x)[0], twin(x)[0], rtol=1e-4, atol=1e-5)
    print("A cell of fastrnn.define_cell was compiled")
print(f"fastrnn {fastrnn.__version__} from {fastrnn.__file__}, torch {torch.__version__}")
print(_C.build_info())

"""`fastrnn.quantize`: exact integer sums, bounded errors, and the interface of the float layers."""

from __future__ import annotations

import copy
import io
import pickle
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from support import CELLS, build, run_python
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.nn.utils.rnn import (
    PackedSequence,
    pack_padded_sequence,
    pack_sequence,
    pad_packed_sequence,
)

import fastrnn
from fastrnn import _C
from fastrnn.ops.int8 import DEPTH, MOST_COLUMNS, UNITS, Int8Weights
from fastrnn.spec import BY_MODE

KERNELS = _C._testing.available_int8_kernels()
AVX512 = ["avx512", "avx512_vnni", "amx_int8_emulated", "amx_int8"]
EMULATED = "amx_int8_emulated" in KERNELS


@pytest.fixture(params=KERNELS)
def kernels(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each set of int8 kernels of this machine."""
    _C._testing.set_int8_kernels(request.param)
    yield request.param
    _C._testing.set_int8_kernels(None)


def chosen(batch: int) -> str:
    """Returns the kernels that the rule chooses for a batch."""
    reason: str = _C.plan("lstm", 20, batch, 64, 64, dtype="int8")["int8"]
    return reason.partition(":")[0]


def tensor_of(data: bytes, shape: tuple[int, ...]) -> Tensor:
    return torch.frombuffer(bytearray(data), dtype=torch.int32).view(shape)


class TestSums:
    """The kernels of every instruction set compute the same integers."""

    @pytest.mark.parametrize("gates", [1, 3, 4])
    @pytest.mark.parametrize("quads", [1, 2, 3, 7, 33])
    @pytest.mark.parametrize("rows", [1, 2, 5, 13, 40])
    def test_random(self, kernels: str, gates: int, quads: int, rows: int) -> None:
        data = torch.randint(0, 256, (rows, quads * DEPTH))
        panel = torch.randint(-127, 128, (quads, gates, UNITS, DEPTH))
        self.check(data, panel, torch.randint(0, 256, (rows,)).tolist())

    @pytest.mark.parametrize("sign", [-1, 1])
    @pytest.mark.parametrize("zero_point", [0, 128, 255])
    def test_extremes(self, kernels: str, sign: int, zero_point: int) -> None:
        """Pairs of products do not fit in 16 bits here, and the sum is near 2^30."""
        quads = MOST_COLUMNS // DEPTH
        for gates in (1, 3, 4):
            data = torch.full((3, MOST_COLUMNS), 255)
            panel = torch.full((quads, gates, UNITS, DEPTH), 127 * sign)
            self.check(data, panel, [zero_point] * 3)

    def check(self, data: Tensor, panel: Tensor, zero_points: list[int]) -> None:
        quads, gates, _, _ = panel.shape
        found = _C._testing.int8_sums(
            data.to(torch.uint8).numpy().tobytes(),
            zero_points,
            panel.to(torch.int8).numpy().tobytes(),
            gates,
        )
        weights = panel.permute(1, 2, 0, 3).reshape(gates * UNITS, quads * DEPTH)
        centred = data - torch.tensor(zero_points).unsqueeze(1)
        expected = (centred.double() @ weights.double().T).to(torch.int32)
        assert torch.equal(tensor_of(found, expected.shape), expected)

    @pytest.mark.parametrize("gates", [1, 3, 4])
    @pytest.mark.parametrize("quads", [15, 16, 17, 48])
    def test_tiles(self, kernels: str, gates: int, quads: int) -> None:
        """Numbers of rows and columns next to whole tiles of AMX."""
        panel = torch.randint(-127, 128, (quads, gates, UNITS, DEPTH))
        for rows in (15, 16, 17, 31, 32, 33, 48, 49, 64, 81):
            data = torch.randint(0, 256, (rows, quads * DEPTH))
            self.check(data, panel, torch.randint(0, 256, (rows,)).tolist())

    def test_wrong_arguments(self) -> None:
        with pytest.raises(ValueError, match="gates must be 1, 3 or 4"):
            _C._testing.int8_sums(b"0000", [0], b"0" * 128, 2)
        with pytest.raises(ValueError, match="as many columns per row"):
            _C._testing.int8_sums(b"000", [0], b"0" * 64, 1)
        with pytest.raises(ValueError, match="available_int8_kernels"):
            _C._testing.set_int8_kernels("mmx")


class TestChoice:
    def test_follows_the_instruction_set(self) -> None:
        try:
            for isa in _C.available_isas():
                _C.set_isa(isa)
                assert chosen(1).startswith(isa)
                assert chosen(1) == [name for name in KERNELS if name.startswith(isa)][-1]
        finally:
            _C.set_isa(None)

    @pytest.mark.skipif(not EMULATED, reason="the emulation needs AVX-512")
    def test_amx_is_chosen_for_batches(self) -> None:
        """Under the emulation, which stands for a CPU with AMX."""
        code = """
import torch, fastrnn
from fastrnn import _C
for batch, hidden in ((1, 256), (15, 64), (16, 63), (16, 64), (64, 512)):
    print(_C.plan("lstm", 20, batch, 64, hidden, dtype="int8")["int8"].partition(":")[0])
_C.set_isa("avx2")
print(_C.plan("lstm", 20, 16, 64, 64, dtype="int8")["int8"].partition(":")[0])
_C.set_isa(None)
quantized = fastrnn.quantize(fastrnn.LSTM(40, 70, num_layers=2, bidirectional=True))
call = fastrnn.explain(quantized, torch.zeros(3, 19, 40))
print([plan["int8"].startswith("amx_int8") for plan in call.plans])
torch.manual_seed(1)
x = torch.randn(9, 33, 40)
y, _ = quantized(x)
_C._testing.set_int8_kernels("avx512")
print(torch.equal(quantized(x)[0], y))
"""
        printed = run_python(code, FASTRNN_EMULATE_AMX="1").splitlines()
        few = chosen(1)
        assert printed[:3] == [few] * 3
        assert all(name.startswith("amx_int8") for name in printed[3:5])
        assert printed[5:] == ["avx2", "[True, True]", "True"]

    def test_emulation_needs_a_request(self) -> None:
        assert "emulated" not in chosen(64)

    def test_plan_rejects_other_layers(self) -> None:
        for cell, options, message in (
            ("slstm", {}, "cell must be one that has int8 kernels, got 'slstm'"),
            ("lstm", {"training": True}, "training must be False for int8, got True"),
            ("lstm", {"proj_size": 2}, "proj_size must be 0 for int8, got 2"),
            ("lstm", {"input_size": MOST_COLUMNS + 1}, "input_size must be at most 32768"),
        ):
            sizes: Any = {"steps": 2, "batch": 3, "input_size": 4, "hidden_size": 5}
            with pytest.raises(ValueError, match=message):
                _C.plan(cell, **(sizes | options), dtype="int8")

    @pytest.mark.parametrize("packs", [False, True])
    def test_explain_names_the_kernels(self, kernels: str, packs: bool) -> None:
        quantized: Any = fastrnn.quantize(build("gru", 5, 20, num_layers=2, bidirectional=True))
        x: Any = torch.randn(3, 2, 5)
        text = str(fastrnn.explain(quantized, pack_sequence([x[:, 0], x[:2, 1]]) if packs else x))
        assert "gru, 2 layer(s) of int8 weights on " in text
        assert text.count(f"int8={kernels}: forced") == 2
        assert quantized(x)[0].shape == (3, 2, 40)  # explain has left the module as it was

    def test_explain_checks_the_arguments(self) -> None:
        quantized: Any = fastrnn.quantize(build("gru", 5, 20))
        with pytest.raises(RuntimeError, match="input must be of 5 features, got 4"):
            fastrnn.explain(quantized, torch.randn(3, 2, 4))


def round_rows(values: Tensor) -> Tensor:
    """The values of rows after rounding to 8 bits with a scale and zero point of their own."""
    low, high = (
        values.amin(-1, keepdim=True).clamp(max=0),
        values.amax(-1, keepdim=True).clamp(min=0),
    )
    scale = (high - low) / 255
    scale = torch.where(scale > 0, scale, 1)
    zero = (-low / scale).round()
    return (((values / scale).round() + zero).clamp(0, 255) - zero) * scale


def run_rounded(
    quantized: Any, x: Tensor, h0: Tensor, c0: Tensor | None, rounds: bool = True
) -> Tensor:
    """One layer and direction in float64 with the int8 weights and, optionally, rounded values."""
    spec = BY_MODE[quantized.mode]
    w_ih, w_hh = (
        quantized.weight("weight_ih_l0").double(),
        quantized.weight("weight_hh_l0").double(),
    )
    hidden = quantized.hidden_size
    bias = quantized.bias_l0.permute(1, 0, 2).reshape(spec.pre, -1)[:, :hidden].double()
    b_ih, b_hh = torch.zeros(2, spec.gates, hidden, dtype=torch.float64)
    for gate, column in enumerate(spec.pre_h):
        b_hh[gate] = bias[column]
    for gate, column in enumerate(spec.pre_x):
        if column not in spec.pre_h:
            b_ih[gate] = bias[column]
    h, c = h0.double(), None if c0 is None else c0.double()
    scale = h.abs().amax(1, keepdim=True).clamp(min=1) / 127
    outputs = []
    for row in x.double():
        seen, before = row, h
        if rounds:
            seen = round_rows(row)
            is_relu = quantized.mode == "RNN_RELU"
            before = round_rows(h) if is_relu else (h / scale).round() * scale
        gates_x = seen @ w_ih.T + b_ih.flatten()
        gates_h = before @ w_hh.T + b_hh.flatten()
        h, c = reference_cell(spec.name, gates_x, gates_h, h, c)
        outputs.append(h)
    return torch.stack(outputs)


def reference_cell(
    cell: str, x: Tensor, h_part: Tensor, h: Tensor, c: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """One step from the products of both sides."""
    if cell == "lstm":
        assert c is not None
        i, f, g, o = (x + h_part).chunk(4, 1)
        c = f.sigmoid() * c + i.sigmoid() * g.tanh()
        return o.sigmoid() * c.tanh(), c
    if cell == "gru":
        xr, xz, xn = x.chunk(3, 1)
        hr, hz, hn = h_part.chunk(3, 1)
        n = (xn + (xr + hr).sigmoid() * hn).tanh()
        return n + (xz + hz).sigmoid() * (h - n), None
    activation = {"rnn_tanh": torch.tanh, "rnn_relu": torch.relu, "rnn_sigmoid": torch.sigmoid}
    return activation[cell](x + h_part), None


def states_for(quantized: Any, batch: int, size: float = 1.0) -> Any:
    spec = BY_MODE[quantized.mode]
    directions = 2 if quantized.bidirectional else 1
    shape = (quantized.num_layers * directions, batch, quantized.hidden_size)
    h0 = size * (2 * torch.rand(shape) - 1)
    return (h0, torch.randn(shape)) if spec.has_cell_state else h0


@pytest.mark.parametrize("cell", CELLS)
class TestError:
    @pytest.mark.parametrize(
        ("steps", "batch", "inputs", "hidden"), [(1, 1, 5, 7), (6, 3, 33, 49), (9, 17, 16, 64)]
    )
    @pytest.mark.parametrize("size", [0.5, 3.0])
    def test_result_is_that_of_rounded_values(
        self, kernels: str, cell: str, steps: int, batch: int, inputs: int, hidden: int, size: float
    ) -> None:
        """Compares with the same rounding in float64.

        A value near the middle of two integers may be rounded to either: the exact recurrence with
        the int8 weights tells how large such differences are.
        """
        quantized: Any = fastrnn.quantize(build(cell, inputs, hidden))
        x, hx = torch.randn(steps, batch, inputs), states_for(quantized, batch, size)
        h0, c0 = (hx[0][0], hx[1][0]) if isinstance(hx, tuple) else (hx[0], None)
        found, _ = quantized(x, hx)
        expected = run_rounded(quantized, x, h0, c0)
        rounding = (run_rounded(quantized, x, h0, c0, rounds=False) - expected).abs().max()
        assert rounding > 0
        # most values are rounded alike; the rest differs by less than all roundings together do
        difference = (found.double() - expected).abs()
        assert difference.max() <= rounding
        assert difference.median() <= 0.1 * rounding

    def test_weights_are_rounded_per_row(self, cell: str) -> None:
        layer: Any = build(cell, 21, 19, num_layers=2, bidirectional=True)
        quantized: Any = fastrnn.quantize(layer)
        for name, weight in layer.named_parameters():
            if name.startswith("weight"):
                step = weight.abs().amax(1, keepdim=True) / 127
                error = (quantized.weight(name) - weight).abs()
                assert (error <= 0.501 * step).all()

    def test_close_to_the_float_layer(self, kernels: str, cell: str) -> None:
        """The error is at most 3 steps of 1/127 for torch's initial weights."""
        layer: Any = build(cell, 64, 128, num_layers=2, bidirectional=True).eval()
        quantized = fastrnn.quantize(layer)
        x = torch.randn(30, 4, 64)
        with torch.no_grad():
            expected, hidden = layer(x)
            found, other = quantized(x)
        assert (found - expected).abs().max() < 3 / 127
        for a, b in zip(hidden, other, strict=True):
            assert (a - b).abs().max() < 6 / 127
        assert not torch.equal(found, expected)

    def test_one_thread_computes_the_same_bits(self, cell: str) -> None:
        quantized: Any = fastrnn.quantize(build(cell, 96, 300, bidirectional=True))
        x = torch.randn(12, 9, 96)
        found, _ = quantized(x)
        threads = torch.get_num_threads()
        try:
            torch.set_num_threads(1)
            assert torch.equal(quantized(x)[0], found)
        finally:
            torch.set_num_threads(threads)

    @pytest.mark.parametrize(
        ("steps", "batch", "inputs", "hidden"),
        [(5, 1, 3, 5), (4, 15, 64, 16), (7, 17, 65, 48), (3, 40, 130, 72), (2, 81, 7, 128)],
    )
    @pytest.mark.parametrize("bidirectional", [False, True])
    def test_kernels_of_an_instruction_set_agree(
        self,
        cell: str,
        steps: int,
        batch: int,
        inputs: int,
        hidden: int,
        bidirectional: bool,
    ) -> None:
        """Those with AVX-512 compute the same bits: with VNNI and in tiles."""
        quantized: Any = fastrnn.quantize(
            build(cell, inputs, hidden, num_layers=2, bidirectional=bidirectional)
        )
        x, hx = torch.randn(steps, batch, inputs), states_for(quantized, batch, 1.5)
        lengths = torch.randint(1, steps + 1, (batch,))
        lengths[0] = steps
        packed = pack_padded_sequence(x, lengths, enforce_sorted=False)
        expected: list[Any] = []
        for name in KERNELS:
            if name not in AVX512:
                continue
            _C._testing.set_int8_kernels(name)
            try:
                y, states = quantized(x, hx)
                ragged, _ = quantized(packed, hx)
            finally:
                _C._testing.set_int8_kernels(None)
            found = [y, *(states if isinstance(states, tuple) else [states]), ragged.data]
            expected = expected or found
            for a, b in zip(found, expected, strict=True):
                assert torch.equal(a, b)

    def test_long_sequences(self, kernels: str, cell: str) -> None:
        """More rows than are projected ahead at once: a step does not depend on the chunk."""
        quantized: Any = fastrnn.quantize(build(cell, 8, 24))
        x = torch.randn(250, 2, 8)
        whole, _ = quantized(x)
        first, hidden = quantized(x[:101])
        second, _ = quantized(x[101:], hidden)
        if cell == "gru":  # its state may exceed 1 by a rounding
            assert (torch.cat([first, second]) - whole).abs().max() < 1 / 127
        else:
            assert torch.equal(torch.cat([first, second]), whole)


@pytest.mark.parametrize("cell", CELLS)
class TestInterface:
    def pair(self, cell: str, *args: Any, **options: Any) -> tuple[Any, Any]:
        layer = build(cell, *args, **options).eval()
        return layer, fastrnn.quantize(layer)

    def compare(self, ours: Any, theirs: Any) -> None:
        if isinstance(theirs, PackedSequence):
            assert isinstance(ours, PackedSequence)
            assert torch.equal(ours.batch_sizes, theirs.batch_sizes)
            ours, theirs = ours.data, theirs.data
        if isinstance(theirs, tuple):
            assert isinstance(ours, tuple)
            for a, b in zip(ours, theirs, strict=True):
                self.compare(a, b)
            return
        assert ours.shape == theirs.shape
        assert ours.dtype == theirs.dtype
        assert (ours - theirs).abs().max() < 0.05

    @pytest.mark.parametrize("batch_first", [False, True])
    @pytest.mark.parametrize("num_layers", [1, 3])
    @pytest.mark.parametrize("bidirectional", [False, True])
    @pytest.mark.parametrize("bias", [False, True])
    def test_options(
        self, cell: str, batch_first: bool, num_layers: int, bidirectional: bool, bias: bool
    ) -> None:
        layer, quantized = self.pair(
            cell,
            10,
            20,
            num_layers=num_layers,
            bidirectional=bidirectional,
            batch_first=batch_first,
            bias=bias,
        )
        x = torch.randn(3, 5, 10)
        batch = 3 if batch_first else 5
        hx = states_for(quantized, batch, 0.9)
        with torch.no_grad():
            self.compare(quantized(x), layer(x))
            self.compare(quantized(x, hx), layer(x, hx))
            one = x[0] if batch_first else x[:, 0]
            hx = tuple(s[:, 0] for s in hx) if isinstance(hx, tuple) else hx[:, 0]
            self.compare(quantized(one), layer(one))
            self.compare(quantized(one, hx), layer(one, hx))

    @pytest.mark.parametrize("bidirectional", [False, True])
    @pytest.mark.parametrize("enforce_sorted", [False, True])
    def test_packed(self, cell: str, bidirectional: bool, enforce_sorted: bool) -> None:
        layer, quantized = self.pair(cell, 6, 33, num_layers=2, bidirectional=bidirectional)
        lengths = [7, 4, 4, 1] if enforce_sorted else [4, 7, 1, 4]
        sequences = [torch.randn(n, 6) for n in lengths]
        packed = pack_sequence(sequences, enforce_sorted=enforce_sorted)
        hx = states_for(quantized, 4, 0.9)
        with torch.no_grad():
            self.compare(quantized(packed), layer(packed))
            self.compare(quantized(packed, hx), layer(packed, hx))
        # each sequence alone has the same bits: no value depends on its neighbours
        output, lengths_out = pad_packed_sequence(quantized(packed)[0])
        for b, sequence in enumerate(sequences):
            assert lengths_out[b] == len(sequence)
            assert torch.equal(output[: len(sequence), b], quantized(sequence)[0])

    def test_half_input(self, cell: str) -> None:
        _, quantized = self.pair(cell, 10, 20)
        x = torch.randn(3, 2, 10).bfloat16()
        y, _ = quantized(x)
        assert y.dtype == torch.bfloat16
        assert torch.equal(y, quantized(x.float())[0].bfloat16())

    def test_strided_input(self, cell: str) -> None:
        _, quantized = self.pair(cell, 10, 20)
        x = torch.randn(10, 2, 3).permute(2, 1, 0)
        assert torch.equal(quantized(x)[0], quantized(x.contiguous())[0])

    def test_empty_batch(self, cell: str) -> None:
        layer, quantized = self.pair(cell, 10, 20)
        with torch.no_grad():
            assert (
                quantized(torch.randn(3, 0, 10))[0].shape == layer(torch.randn(3, 0, 10))[0].shape
            )

    def test_not_finite(self, kernels: str, cell: str) -> None:
        """NaN and infinities give NaN from their step on, in their sequence only."""
        _, quantized = self.pair(cell, 10, 40)
        x = torch.randn(6, 3, 10)
        clean, _ = quantized(x)
        for value in (float("nan"), float("inf")):
            x[2, 1, 3] = value
            y, _ = quantized(x)
            assert y[2:, 1].isnan().all()
            y[2:, 1] = clean[2:, 1]
            assert torch.equal(y, clean)

    def test_state_dict(self, cell: str) -> None:
        _, quantized = self.pair(cell, 10, 20, num_layers=2, bidirectional=True)
        x = torch.randn(3, 2, 10)
        other = copy.deepcopy(quantized)
        for buffer in other.buffers():
            buffer.zero_()
        assert not torch.equal(other(x)[0], quantized(x)[0])
        stored = io.BytesIO()
        torch.save(quantized.state_dict(), stored)
        stored.seek(0)
        other.load_state_dict(torch.load(stored, weights_only=True))
        assert torch.equal(other(x)[0], quantized(x)[0])
        assert {n.rpartition("_l")[0] for n in quantized.state_dict()} == set(Int8Weights._fields)

    def test_copies(self, cell: str) -> None:
        _, quantized = self.pair(cell, 10, 20)
        x = torch.randn(3, 2, 10)
        for other in (copy.deepcopy(quantized), pickle.loads(pickle.dumps(quantized))):
            assert type(other) is fastrnn.QuantizedRecurrent
            assert repr(other) == repr(quantized)
            assert torch.equal(other(x)[0], quantized(x)[0])

    @pytest.mark.parametrize("dynamic", [False, True])
    def test_compile(self, cell: str, dynamic: bool) -> None:
        _, quantized = self.pair(cell, 10, 20, num_layers=2)
        torch._dynamo.reset()
        compiled = torch.compile(quantized, backend="aot_eager", fullgraph=True, dynamic=dynamic)
        with torch.no_grad():
            for steps in (3, 5):
                x = torch.randn(steps, 2, 10)
                assert torch.equal(compiled(x)[0], quantized(x)[0])

    def test_export(self, cell: str) -> None:
        _, quantized = self.pair(cell, 10, 20)
        x = torch.randn(3, 2, 10)
        program = torch.export.export(quantized, (x,))
        assert "recurrent_int8" in str(program.graph)
        assert torch.equal(program.module()(x)[0], quantized(x)[0])


class TestQuantize:
    def test_nested_and_shared_layers(self) -> None:
        class Model(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.encoder = nn.ModuleDict({"lstm": fastrnn.LSTM(4, 8)})
                self.same = self.encoder["lstm"]
                self.decoder = nn.Linear(8, 3)

            def forward(self, x: Tensor) -> Tensor:
                result: Tensor = self.decoder(self.encoder["lstm"](x)[0])
                return result

        model = Model().train()
        quantized: Any = fastrnn.quantize(model)
        assert type(model.same) is fastrnn.LSTM
        assert model.training
        assert type(quantized.same) is fastrnn.QuantizedRecurrent
        assert quantized.same is quantized.encoder["lstm"]
        assert quantized.decoder is not model.decoder
        assert not any(module.training for module in quantized.modules())
        x = torch.randn(5, 2, 4)
        with torch.no_grad():
            assert (quantized(x) - model(x)).abs().max() < 0.05

    def test_parametrized_weight(self) -> None:
        layer: Any = fastrnn.GRU(4, 8)
        parametrizations.weight_norm(layer, "weight_hh_l0")
        with torch.no_grad():
            layer.parametrizations.weight_hh_l0.original0.mul_(2)
        quantized: Any = fastrnn.quantize(layer)
        error = (quantized.weight("weight_hh_l0") - layer.weight_hh_l0).abs().max()
        assert error <= layer.weight_hh_l0.abs().max() / 250

    def test_converted_and_double_layers(self) -> None:
        layer = fastrnn.convert(nn.LSTM(4, 8).double())
        quantized = fastrnn.quantize(layer)
        assert repr(quantized) == "QuantizedLSTM(4, 8)"
        assert quantized(torch.randn(5, 2, 4))[0].dtype == torch.float32

    def test_repr(self) -> None:
        layer = fastrnn.RNN(4, 8, 2, "relu", bias=False, batch_first=True, bidirectional=True)
        assert repr(fastrnn.quantize(layer)) == (
            "QuantizedRNN(4, 8, nonlinearity='relu', num_layers=2, bias=False, batch_first=True, "
            "bidirectional=True)"
        )

    def test_zero_weights(self) -> None:
        layer = fastrnn.LSTM(4, 8)
        with torch.no_grad():
            for weight in layer.parameters():
                weight.zero_()
            x = torch.randn(5, 2, 4)
            assert torch.equal(fastrnn.quantize(layer)(x)[0], layer(x)[0])

    def test_subclass_keeps_its_weights(self) -> None:
        class Mine(fastrnn.LSTM):
            pass

        model = nn.ModuleList([Mine(4, 8), fastrnn.LSTM(4, 8)])
        with pytest.warns(UserWarning, match="0 keeps its float weights: its class Mine"):
            quantized = fastrnn.quantize(model)
        assert type(quantized[0]) is Mine  # type: ignore[index]

    def test_no_warning(self) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            fastrnn.quantize(fastrnn.LSTM(4, 8))

    def test_wrong_modules(self) -> None:
        with pytest.raises(TypeError, match=r"module must be a torch.nn.Module, got str"):
            fastrnn.quantize("lstm")  # type: ignore[arg-type]
        with pytest.raises(ValueError, match=r"must hold a fastrnn.RNN, LSTM or GRU, got none"):
            fastrnn.quantize(nn.LSTM(4, 8))
        with pytest.raises(NotImplementedError, match="proj_size of LSTM must be 0, got 3"):
            fastrnn.quantize(fastrnn.LSTM(4, 8, proj_size=3))
        with pytest.raises(RuntimeError, match="w_ih_l0 must be on the CPU, got meta"):
            fastrnn.quantize(fastrnn.LSTM(4, 8, device="meta"))
        layer = fastrnn.LSTM(4, 8)
        with torch.no_grad():
            layer.weight_hh_l0[3, 2] = float("nan")
        with pytest.raises(ValueError, match="w_hh_l0 must be finite"):
            fastrnn.quantize(layer)
        with pytest.raises(ValueError, match="must be at most 32768"):
            fastrnn.quantize(fastrnn.RNN(MOST_COLUMNS + 1, 1))


class TestErrors:
    @pytest.fixture
    def lstm(self) -> Any:
        return fastrnn.quantize(fastrnn.LSTM(4, 8))

    def test_training(self, lstm: Any) -> None:
        with pytest.raises(RuntimeError, match="QuantizedLSTM: mode must be False, got True"):
            lstm.train()
        with pytest.raises(RuntimeError, match="mode must be False"):
            nn.Sequential(lstm).train()
        assert lstm.eval() is lstm
        assert not lstm.training

    def test_gradients(self, lstm: Any) -> None:
        x = torch.randn(5, 2, 4, requires_grad=True)
        with pytest.raises(RuntimeError, match="input must be a tensor that needs no gradient"):
            lstm(x)
        with torch.no_grad():
            assert not lstm(x)[0].requires_grad
        h0 = torch.zeros(1, 2, 8, requires_grad=True)
        with pytest.raises(RuntimeError, match=r"hx\[0\] must be a tensor that needs no gradient"):
            lstm(x.detach(), (h0, h0))

    @pytest.mark.parametrize(
        ("input", "hx", "message"),
        [
            ([1.0], None, "input must be a tensor or a PackedSequence, got a list of 1"),
            (torch.zeros(4), None, "input must be 2-D or 3-D, got 1-D"),
            (torch.zeros(5, 2, 3), None, "input must be of 4 features, got 3"),
            (torch.zeros(5, 2, 4).double(), None, "input must be of float32, float16 or bfloat16"),
            (torch.zeros(5, 2, 4, device="meta"), None, "input must be on the CPU, got meta"),
            (torch.zeros(5, 2, 4).to_sparse(), None, "input must be a dense tensor"),
            (torch.zeros(0, 2, 4), None, "Expected sequence length to be larger than 0"),
            (torch.zeros(5, 2, 4), torch.zeros(1, 2, 8), "hx must be a tuple of two tensors"),
            (torch.zeros(5, 2, 4), (torch.zeros(1, 2, 8), None), r"hx\[1\] must be a tensor"),
            (
                torch.zeros(5, 2, 4),
                (torch.zeros(1, 3, 8), torch.zeros(1, 2, 8)),
                r"hx\[0\] must be of shape \[1, 2, 8\], got \[1, 3, 8\]",
            ),
            (
                torch.zeros(5, 2, 4),
                (torch.zeros(1, 2, 8), torch.zeros(1, 2, 8).half()),
                r"hx\[1\] must be of torch.float32 like the input, got torch.float16",
            ),
        ],
    )
    def test_wrong_arguments(self, lstm: Any, input: Any, hx: Any, message: str) -> None:
        with pytest.raises((RuntimeError, TypeError), match=message):
            lstm(input, hx)

    def test_wrong_name_of_a_weight(self, lstm: Any) -> None:
        for name in ("bias_ih_l0", "weight_ih_l1", "weight_hr_l0", "x"):
            with pytest.raises(ValueError, match="name must be that of a weight matrix"):
                lstm.weight(name)

    def arguments(self, lstm: Any) -> dict[str, Any]:
        weights = [getattr(lstm, name + "_l0") for name in Int8Weights._fields]
        state = torch.zeros(1, 2, 8)
        return {
            "x": torch.zeros(5, 2, 4),
            "h0": state,
            "c0": state,
            "weights": weights,
            "batch_sizes": None,
            "cell": "lstm",
        }

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"x": torch.zeros(5, 4)}, "x must have 3 dimensions"),
            ({"x": torch.zeros(5, 3, 4)}, "x must have the batch 2 of h0"),
            ({"x": torch.zeros(5, 2, 5)}, "panels_ih must have the shape"),
            ({"x": torch.zeros(5, 2, 4).double()}, "x must be float32"),
            ({"x": torch.zeros(5, 2, 0)}, "x must have 1 to 32768 features, got 0"),
            ({"h0": torch.zeros(2, 8)}, r"h0 must be \[D, B, H\]"),
            ({"h0": torch.zeros(3, 2, 8)}, "h0 must have 1 or 2 directions"),
            ({"h0": torch.zeros(1, 2, 17)}, "c0 must have the shape"),
            ({"c0": None}, "c0 must be given for lstm"),
            ({"cell": "gru"}, "c0 must not be given for gru"),
            ({"cell": "transformer"}, "cell must be one of"),
            ({"weights": []}, "weights must hold 7 tensors per direction"),
            ({"x": torch.zeros(7, 4), "batch_sizes": torch.tensor([2, 3])}, "not increase"),
            ({"x": torch.zeros(7, 4), "batch_sizes": torch.tensor([2, 2])}, "4 rows that batch"),
            ({"x": torch.zeros(7, 4), "batch_sizes": torch.zeros(2)}, "1-D int64 tensor"),
        ],
    )
    def test_operator_checks(self, lstm: Any, changes: dict[str, Any], message: str) -> None:
        operator = torch.ops.fastrnn.recurrent_int8
        arguments = self.arguments(lstm)
        operator(**arguments)
        with pytest.raises(RuntimeError, match=message):
            operator(**(arguments | changes))

    def test_operator_checks_weights(self, lstm: Any) -> None:
        arguments = self.arguments(lstm)
        for index, name in enumerate(Int8Weights._fields):
            weights = list(arguments["weights"])
            weights[index] = weights[index].double()
            with pytest.raises(RuntimeError, match=f"{name} must be "):
                torch.ops.fastrnn.recurrent_int8(**(arguments | {"weights": weights}))
            weights[index] = arguments["weights"][index][:, :1]
            if weights[index].shape == arguments["weights"][index].shape:
                continue
            with pytest.raises(RuntimeError, match=f"{name} must have the shape"):
                torch.ops.fastrnn.recurrent_int8(**(arguments | {"weights": weights}))

    def test_fake(self, lstm: Any) -> None:
        arguments = self.arguments(lstm)
        torch.library.opcheck(
            torch.ops.fastrnn.recurrent_int8.default,
            tuple(arguments.values()),
            test_utils=("test_schema", "test_faketensor"),
        )

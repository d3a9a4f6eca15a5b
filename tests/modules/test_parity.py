"""The behaviour of torch.nn's recurrent modules, feature by feature, compared with torch itself.

One class per feature, in this order: order of the constructor's arguments, ValueError, TypeError,
warning, state_dict, attributes, methods, extra_repr, inputs, errors of the input, of the hidden
states, of the cells, of devices, dtypes, autocast, torch.nn.utils, subclassing. Errors are compared
by calling both libraries. test_torch_gaps covers what torch does not support.
"""

from __future__ import annotations

import copy
import inspect
import io
import pickle
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from support import DTYPES, check, raised, run, run_python, states, torch_twin
from tolerance import assert_same_in_double
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence
from torch.utils._pytree import tree_leaves

import fastrnn

LAYERS = ["RNN", "LSTM", "GRU"]
STEPS = ["RNNCell", "LSTMCell", "GRUCell"]


def assert_same_error(call: Callable[[Any], Any], message: str | None = None) -> None:
    """Asserts that ``call(namespace)`` raises the same error in both; ``message`` is part of it.

    Calls with and without gradients, because calls without gradients take the fast path.
    """
    for is_recorded in (True, False):
        with torch.set_grad_enabled(is_recorded):
            ours, theirs = raised(lambda: call(fastrnn)), raised(lambda: call(nn))
        assert type(ours) is type(theirs)
        assert str(ours) == str(theirs)
        assert message is None or message in str(ours)


def pair(name: str) -> tuple[nn.Module, nn.Module]:
    """Returns a layer of fastrnn and the same layer of torch.nn."""
    ours = getattr(fastrnn, name)(3, 4, num_layers=2, bidirectional=True)
    return ours, torch_twin(ours)


class TestConstructor:
    @pytest.mark.parametrize("name", LAYERS)
    def test_positional_order(self, name: str) -> None:
        nonlinearity = ["relu"] if name == "RNN" else []
        arguments = [3, 4, 2, *nonlinearity, False, True, 0.25, True]
        ours, theirs = getattr(fastrnn, name)(*arguments), getattr(nn, name)(*arguments)
        assert repr(ours) == repr(theirs)
        for key in nn.RNNBase.__constants__:
            assert getattr(ours, key) == getattr(theirs, key)

    def test_lstm_positional_projection_device_and_dtype(self) -> None:
        arguments = (3, 4, 1, True, False, 0.0, False, 2, "cpu", torch.float64)
        assert repr(fastrnn.LSTM(*arguments)) == repr(nn.LSTM(*arguments))
        assert fastrnn.LSTM(*arguments).weight_hr_l0.dtype == torch.float64

    @pytest.mark.parametrize("name", ["RNN", "GRU"])
    def test_positional_device_is_accepted_before_and_after_proj_size(self, name: str) -> None:
        start = [3, 4, 1, *(["tanh"] if name == "RNN" else []), True, False, 0.0, False]
        cls = getattr(fastrnn, name)
        for end in (("cpu", torch.float64), (None, torch.float64), (0, "cpu", torch.float64)):
            assert cls(*start, *end).weight_ih_l0.dtype == torch.float64

    @pytest.mark.parametrize("name", STEPS)
    def test_cell_positional_order(self, name: str) -> None:
        nonlinearity = ["relu"] if name == "RNNCell" else []
        arguments = [3, 4, False, *nonlinearity, "cpu", torch.float64]
        ours, theirs = getattr(fastrnn, name)(*arguments), getattr(nn, name)(*arguments)
        assert repr(ours) == repr(theirs)
        assert ours.weight_ih.dtype == theirs.weight_ih.dtype

    @pytest.mark.parametrize("name", STEPS)
    def test_cell_signature(self, name: str) -> None:
        ours = inspect.signature(getattr(fastrnn, name)).parameters
        theirs = inspect.signature(getattr(nn, name)).parameters
        assert [(p.name, p.kind, p.default) for p in ours.values()] == [
            (p.name, p.kind, p.default) for p in theirs.values()
        ]

    @pytest.mark.parametrize("name", LAYERS)
    def test_additions_are_keyword_only(self, name: str) -> None:
        nonlinearity = ["tanh"] if name == "RNN" else []
        arguments = [3, 4, 1, *nonlinearity, True, False, 0.0, False, 0, "cpu", torch.float32]
        assert getattr(fastrnn, name)(*arguments, weight_dtype=torch.float16)
        assert_same_error(lambda lib: getattr(lib, name)(*arguments, torch.float16))


class TestValueErrors:
    ERRORS = (
        ({"hidden_size": 0}, "hidden_size must be greater than zero"),
        ({"input_size": 0}, "input_size must be greater than zero"),
        ({"num_layers": 0}, "num_layers must be greater than zero"),
        ({"dropout": 1.5}, "dropout should be a number in range [0, 1]"),
        ({"dropout": -0.1}, "dropout should be a number in range [0, 1]"),
        ({"dropout": True}, "dropout should be a number in range [0, 1]"),
    )

    @pytest.mark.parametrize(("options", "message"), ERRORS, ids=str)
    @pytest.mark.parametrize("name", LAYERS)
    def test_every_module(self, name: str, options: dict[str, Any], message: str) -> None:
        full = {"input_size": 3, "hidden_size": 4, **options}
        assert_same_error(lambda lib: getattr(lib, name)(**full), message)

    @pytest.mark.parametrize(
        ("size", "message"),
        [
            (4, "proj_size has to be smaller than hidden_size"),
            (-1, "proj_size should be a positive integer or zero to disable projections"),
        ],
    )
    def test_projection(self, size: int, message: str) -> None:
        assert_same_error(lambda lib: lib.LSTM(3, 4, proj_size=size), message)

    @pytest.mark.parametrize("name", ["RNN", "GRU"])
    def test_projection_is_for_lstm(self, name: str) -> None:
        message = "proj_size argument is only supported for LSTM, not RNN or GRU"
        assert_same_error(lambda lib: getattr(lib, name)(3, 4, proj_size=2), message)

    def test_unknown_nonlinearity(self) -> None:
        ours = raised(lambda: fastrnn.RNN(3, 4, nonlinearity="x"))
        theirs = raised(lambda: nn.RNN(3, 4, nonlinearity="x"))
        assert type(ours) is type(theirs)
        assert str(theirs) == "Unknown nonlinearity 'x'. Select from 'tanh' or 'relu'."
        assert str(ours) == "Unknown nonlinearity 'x'. Select from 'tanh', 'relu' or 'sigmoid'."
        assert_same_error(lambda lib: lib.RNNCell(3, 4, nonlinearity="x")(torch.zeros(1, 3)))


class TestTypeErrors:
    ERRORS = (
        ({"bias": 1}, "bias should be of type bool, got: int"),
        ({"batch_first": 1}, "batch_first should be of type bool, got: int"),
        ({"input_size": 3.0}, "input_size should be of type int, got: float"),
        ({"hidden_size": "4"}, "hidden_size should be of type int, got: str"),
    )

    @pytest.mark.parametrize(("options", "message"), ERRORS, ids=str)
    @pytest.mark.parametrize("name", LAYERS)
    def test_every_module(self, name: str, options: dict[str, Any], message: str) -> None:
        full = {"input_size": 3, "hidden_size": 4, **options}
        assert_same_error(lambda lib: getattr(lib, name)(**full), message)


class TestWarning:
    @pytest.mark.parametrize("name", LAYERS)
    def test_dropout_warning(self, name: str) -> None:
        texts = []
        for lib in (fastrnn, nn):
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                getattr(lib, name)(3, 4, dropout=0.5)
            texts.append([(w.category, str(w.message)) for w in caught])
        assert texts[0] == texts[1]
        assert len(texts[0]) == 1


class TestStateDict:
    OPTIONS = (
        {},
        {"bias": False},
        {"num_layers": 2, "bidirectional": True},
        {"num_layers": 2, "bidirectional": True, "bias": False, "batch_first": True},
    )

    @pytest.mark.parametrize("options", OPTIONS, ids=str)
    @pytest.mark.parametrize("name", LAYERS)
    def test_keys_shapes_order_and_both_ways(self, name: str, options: dict[str, Any]) -> None:
        self.compare(name, {"input_size": 3, "hidden_size": 4, **options})

    @pytest.mark.parametrize("bias", [True, False])
    def test_projection(self, bias: bool) -> None:
        options = {"proj_size": 2, "num_layers": 2, "bidirectional": True, "bias": bias}
        self.compare("LSTM", {"input_size": 3, "hidden_size": 4, **options})

    @pytest.mark.parametrize("bias", [True, False])
    @pytest.mark.parametrize("name", STEPS)
    def test_cells(self, name: str, bias: bool) -> None:
        ours, _ = self.compare(name, {"input_size": 3, "hidden_size": 4, "bias": bias})
        assert "bias_ih" in ours._parameters
        assert (ours.bias_ih is None) != bias

    def compare(self, name: str, options: dict[str, Any]) -> tuple[nn.Module, nn.Module]:
        """Also checks that the same seed gives the same initial parameters."""
        torch.manual_seed(5)
        ours = getattr(fastrnn, name)(**options)
        torch.manual_seed(5)
        theirs = getattr(nn, name)(**options)
        first, second = ours.state_dict(), theirs.state_dict()
        assert list(first) == list(second)
        for key, value in second.items():
            assert torch.equal(first[key], value)
        for target, source in ((ours, theirs), (theirs, ours)):
            with torch.no_grad():
                for parameter in source.parameters():
                    parameter.add_(1)
            target.load_state_dict(source.state_dict(), strict=True)
            for key, value in source.state_dict().items():
                assert torch.equal(target.state_dict()[key], value)
        return ours, theirs


class TestAttributes:
    @pytest.mark.parametrize("name", LAYERS)
    def test_attributes(self, name: str) -> None:
        ours, theirs = pair(name)
        assert vars(ours).keys() == vars(theirs).keys()
        assert ours.mode == theirs.mode
        assert ours._flat_weights_names == theirs._flat_weights_names
        assert ours._all_weights == theirs._all_weights
        assert all(
            a is getattr(ours, n)
            for a, n in zip(ours._flat_weights, ours._flat_weights_names, strict=True)
        )
        assert [[w.shape for w in row] for row in ours.all_weights] == [
            [w.shape for w in row] for row in theirs.all_weights
        ]
        assert [ref() for ref in ours._flat_weight_refs] == ours._flat_weights
        assert type(ours).__constants__ == type(theirs).__constants__
        assert type(ours).__jit_unused_properties__ == ["all_weights"]

    @pytest.mark.parametrize("name", STEPS)
    def test_cell_attributes(self, name: str) -> None:
        ours, theirs = getattr(fastrnn, name)(3, 4), getattr(nn, name)(3, 4)
        assert vars(ours).keys() == vars(theirs).keys()
        assert type(ours).__constants__ == type(theirs).__constants__

    @pytest.mark.parametrize("name", LAYERS)
    def test_modules_have_every_attribute_of_torch(self, name: str) -> None:
        ours, theirs = getattr(fastrnn, name), getattr(nn, name)
        assert [n for n in dir(theirs) if not hasattr(ours, n)] == []
        assert "forward" in vars(ours)

    def test_sigmoid_mode(self) -> None:
        assert fastrnn.RNN(3, 4, nonlinearity="sigmoid").mode == "RNN_SIGMOID"
        assert "nonlinearity=sigmoid" in repr(fastrnn.RNNCell(3, 4, nonlinearity="sigmoid"))

    @pytest.mark.parametrize("name", LAYERS)
    def test_dropout_is_read_on_each_call(self, name: str) -> None:
        ours, theirs = (module.double() for module in pair(name))
        x = torch.randn(5, 2, 3, dtype=torch.float64)
        outputs = []
        for module in (ours, theirs):
            for dropout in (0.5, 0.0):
                module.dropout = dropout
                torch.manual_seed(1)
                outputs.append(module(x)[0])
        assert_same_in_double(outputs[0], outputs[2])
        assert_same_in_double(outputs[1], outputs[3])
        assert not torch.equal(outputs[0], outputs[1])


class TestMethods:
    @pytest.mark.parametrize("name", LAYERS)
    def test_flatten_parameters_does_nothing_and_never_raises(self, name: str) -> None:
        module, _ = pair(name)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            module.flatten_parameters()
            del module.weight_hh_l0
            module.flatten_parameters()
            module._init_flat_weights()
        assert module._flat_weights[1] is None

    @pytest.mark.parametrize("name", LAYERS)
    def test_setattr_keeps_flat_weights(self, name: str) -> None:
        module, _ = pair(name)
        new = nn.Parameter(torch.zeros_like(module.weight_hh_l1))
        module.weight_hh_l1 = new
        assert module._flat_weights[module._flat_weights_names.index("weight_hh_l1")] is new
        check(module, torch.randn(5, 2, 3))

    @pytest.mark.parametrize("name", LAYERS)
    def test_weights_have_changed(self, name: str) -> None:
        module, _ = pair(name)
        assert not module._weights_have_changed()
        module._parameters["weight_ih_l0"] = nn.Parameter(torch.zeros_like(module.weight_ih_l0))
        assert module._weights_have_changed()
        module._update_flat_weights()
        assert not module._weights_have_changed()
        assert module._flat_weights[0] is module.weight_ih_l0

    @pytest.mark.parametrize("name", LAYERS)
    def test_apply_replaces_flat_weights(self, name: str) -> None:
        module, _ = pair(name)
        module.double()
        assert all(w.dtype == torch.float64 for w in module._flat_weights)
        assert [ref() for ref in module._flat_weight_refs] == module._flat_weights
        check(module, torch.randn(5, 2, 3, dtype=torch.float64))

    @pytest.mark.parametrize("batch_first", [False, True])
    @pytest.mark.parametrize("name", LAYERS)
    def test_expected_sizes_and_permutation(self, name: str, batch_first: bool) -> None:
        extra = {"proj_size": 2} if name == "LSTM" else {}
        ours = getattr(fastrnn, name)(3, 4, 2, bidirectional=True, batch_first=batch_first, **extra)
        theirs = torch_twin(ours)
        x, sizes = torch.zeros(5, 7, 3), torch.tensor([3, 2])
        for arguments in ((x, None), (torch.zeros(5, 3), sizes)):
            assert ours.get_expected_hidden_size(*arguments) == theirs.get_expected_hidden_size(
                *arguments
            )
            if name == "LSTM":
                assert ours.get_expected_cell_size(*arguments) == theirs.get_expected_cell_size(
                    *arguments
                )
        hx = torch.arange(6.0).view(1, 3, 2)
        order = torch.tensor([2, 0, 1])
        both = [
            m.permute_hidden((hx, hx + 1) if name == "LSTM" else hx, order) for m in (ours, theirs)
        ]
        for own, other in zip(tree_leaves(both[0]), tree_leaves(both[1]), strict=True):
            assert torch.equal(own, other)
        assert ours.permute_hidden(hx, None) is hx
        assert ours.check_hidden_size(hx, (1, 3, 2)) is None
        assert str(raised(lambda: ours.check_hidden_size(hx, (1, 2, 2)))) == str(
            raised(lambda: theirs.check_hidden_size(hx, (1, 2, 2)))
        )

    @pytest.mark.parametrize("name", LAYERS)
    def test_copy_and_pickle(self, name: str) -> None:
        module, _ = pair(name)
        x = torch.randn(5, 2, 3)
        expected = module(x)[0]
        assert "_flat_weight_refs" not in module.__getstate__()
        buffer = io.BytesIO()
        torch.save(module, buffer)
        buffer.seek(0)
        copies = (
            copy.deepcopy(module),
            pickle.loads(pickle.dumps(module)),
            torch.load(buffer, weights_only=False),
        )
        for twin in copies:
            assert type(twin) is type(module)
            assert torch.equal(twin(x)[0], expected)
            assert all(
                a is not b for a, b in zip(twin._flat_weights, module._flat_weights, strict=True)
            )
            assert all(
                w is getattr(twin, n)
                for w, n in zip(twin._flat_weights, twin._flat_weights_names, strict=True)
            )

    @pytest.mark.parametrize("name", LAYERS)
    def test_setstate_reads_old_pickles(self, name: str) -> None:
        """Old pickles lack proj_size or _flat_weights, or hold tensors in all_weights."""
        module, _ = pair(name)
        expected = module(torch.ones(5, 2, 3))[0]
        state = module.__getstate__()
        for key in ("proj_size", "_flat_weights", "_flat_weights_names", "_all_weights"):
            del state[key]
        state["all_weights"] = module.all_weights
        old = getattr(fastrnn, name).__new__(getattr(fastrnn, name))
        old.__setstate__(state)
        assert old.proj_size == 0
        assert old._all_weights == module._all_weights
        assert torch.equal(old(torch.ones(5, 2, 3))[0], expected)

    @pytest.mark.parametrize("name", LAYERS)
    def test_replica_has_its_own_lists(self, name: str) -> None:
        module, _ = pair(name)
        replica = module._replicate_for_data_parallel()
        assert replica._flat_weights is not module._flat_weights
        assert replica._flat_weights_names is not module._flat_weights_names

    @pytest.mark.parametrize("name", LAYERS)
    def test_reset_parameters_is_uniform(self, name: str) -> None:
        module = getattr(fastrnn, name)(30, 16)
        for parameter in module.parameters():
            assert parameter.abs().max() <= 0.25
        assert module.weight_ih_l0.std().item() == pytest.approx(0.5 / 12**0.5, rel=0.1)


class TestExtraRepr:
    @pytest.mark.parametrize("name", LAYERS)
    def test_extra_repr(self, name: str) -> None:
        options: dict[str, Any] = {
            "num_layers": 2,
            "bias": False,
            "batch_first": True,
            "dropout": 0.5,
            "bidirectional": True,
        }
        if name == "LSTM":
            options["proj_size"] = 2
        if name == "RNN":
            options["nonlinearity"] = "relu"
        ours = getattr(fastrnn, name)(3, 4, **options)
        assert repr(ours) == repr(getattr(nn, name)(3, 4, **options))
        if name == "LSTM":
            assert ours.extra_repr() == (
                "3, 4, proj_size=2, num_layers=2, bias=False, batch_first=True, dropout=0.5, "
                "bidirectional=True"
            )

    def test_cell_extra_repr(self) -> None:
        for lib in (fastrnn, nn):
            cell = lib.RNNCell(3, 4, bias=False, nonlinearity="relu")
            assert repr(cell) == "RNNCell(3, 4, bias=False, nonlinearity=relu)"


class TestInputs:
    """Special cases. test_modules and test_properties compare values and gradients of every form
    of input."""

    def test_states_as_list_or_tuple(self) -> None:
        module = fastrnn.LSTM(3, 4)
        h, c = torch.randn(2, 1, 2, 4)
        x = torch.randn(5, 2, 3)
        assert torch.equal(module(x, (h, c))[0], module(x, [h, c])[0])

    @pytest.mark.parametrize("name", LAYERS)
    def test_result_types(self, name: str) -> None:
        ours = getattr(fastrnn, name)(3, 4)
        theirs = torch_twin(ours)
        packed = pack_padded_sequence(torch.randn(5, 2, 3), [3, 5], enforce_sorted=False)
        for x in (torch.randn(5, 2, 3), torch.randn(5, 3), packed):
            got, expected = ours(x), theirs(x)
            assert type(got) is type(expected) is tuple
            assert type(got[0]) is type(expected[0])
            assert type(got[1]) is type(expected[1])
            if isinstance(got[0], PackedSequence):
                for a, b in zip(got[0][1:], expected[0][1:], strict=True):
                    assert torch.equal(a, b)

    @pytest.mark.parametrize("name", LAYERS)
    def test_final_state_is_never_batch_first(self, name: str) -> None:
        module = getattr(fastrnn, name)(3, 4, 2, batch_first=True)
        output, hidden = module(torch.randn(7, 5, 3))
        h = hidden[0] if name == "LSTM" else hidden
        assert output.shape == (7, 5, 4)
        assert h.shape == (2, 7, 4)

    @pytest.mark.parametrize("name", LAYERS)
    def test_batch_zero(self, name: str) -> None:
        module = getattr(fastrnn, name)(3, 4, 2, bidirectional=True)
        check(module, torch.randn(5, 0, 3, requires_grad=True))

    def test_packed_keeps_the_callers_order(self) -> None:
        """Initial and final states are in the order of the unsorted sequences."""
        module = fastrnn.GRU(3, 4, dtype=torch.float64)
        x = torch.randn(6, 3, 3, dtype=torch.float64)
        h0 = torch.randn(1, 3, 4, dtype=torch.float64)
        lengths = [2, 6, 4]
        _, h_n = module(pack_padded_sequence(x, lengths, enforce_sorted=False), h0)
        for index, length in enumerate(lengths):
            _, alone = module(x[:length, index : index + 1], h0[:, index : index + 1].contiguous())
            assert_same_in_double(h_n[:, index : index + 1], alone)

    @pytest.mark.parametrize("is_recorded", [True, False])
    @pytest.mark.parametrize("layers", [1, 2])
    @pytest.mark.parametrize("name", LAYERS)
    def test_views(self, name: str, layers: int, is_recorded: bool) -> None:
        """Covers transposed, expanded and strided input and states, with and without gradients."""
        module = getattr(fastrnn, name)(3, 4, layers)
        x, h = torch.randn(5, 2, 3), torch.randn(layers, 2, 4)
        views = (
            (x.transpose(0, 1).contiguous().transpose(0, 1), h.mT.contiguous().mT),
            (x[:, :1].expand(5, 2, 3), h[:, :1].expand(layers, 2, 4)),
            (x.repeat(1, 1, 2)[..., ::2], h.repeat(1, 1, 2)[..., ::2]),
            (x[::2], h.repeat(2, 1, 1)[::2]),
        )
        with torch.set_grad_enabled(is_recorded):
            for x_view, h_view in views:
                hx = (h_view, h_view) if name == "LSTM" else h_view
                dense = x_view.contiguous(), h_view.contiguous()
                expected = module(dense[0], (dense[1], dense[1]) if name == "LSTM" else dense[1])
                assert torch.equal(module(x_view, hx)[0], expected[0])


class TestInputErrors:
    @pytest.mark.parametrize("shape", [(3,), (2, 2, 2, 3)], ids=str)
    @pytest.mark.parametrize("name", LAYERS)
    def test_dimensions(self, name: str, shape: tuple[int, ...]) -> None:
        word = "tensor instead" if name == "RNN" else "instead"
        assert_same_error(
            lambda lib: getattr(lib, name)(3, 4)(torch.zeros(shape)),
            f"{name}: Expected input to be 2D or 3D, got {len(shape)}D {word}",
        )

    @pytest.mark.parametrize("name", LAYERS)
    def test_dtype(self, name: str) -> None:
        assert_same_error(
            lambda lib: getattr(lib, name)(3, 4)(torch.zeros(5, 2, 3, dtype=torch.float64)),
            "RNN input dtype (torch.float64) does not match weight dtype (torch.float32). "
            "Convert input: input.to(torch.float32), or convert model: model.to(torch.float64)",
        )

    @pytest.mark.parametrize("batch_first", [False, True])
    @pytest.mark.parametrize("name", LAYERS)
    def test_input_size(self, name: str, batch_first: bool) -> None:
        for shape in ((5, 2, 7), (5, 7)):
            assert_same_error(
                lambda lib: getattr(lib, name)(3, 4, batch_first=batch_first)(
                    torch.zeros(shape)  # noqa: B023
                ),
                "input.size(-1) must be equal to input_size. Expected 3, got 7",
            )


class TestHiddenErrors:
    @pytest.mark.parametrize("shape", [(1, 3, 4), (2, 2, 4), (1, 2, 5)], ids=str)
    @pytest.mark.parametrize("name", LAYERS)
    def test_size(self, name: str, shape: tuple[int, ...]) -> None:
        assert_same_error(
            lambda lib: getattr(lib, name)(3, 4)(torch.zeros(5, 2, 3), states(name, *shape)),
            f"Expected hidden{'[0]' if name == 'LSTM' else ''} size (1, 2, 4), got {list(shape)}",
        )

    def test_second_state(self) -> None:
        hx = (torch.zeros(1, 2, 4), torch.zeros(1, 3, 4))
        assert_same_error(
            lambda lib: lib.LSTM(3, 4)(torch.zeros(5, 2, 3), hx),
            "Expected hidden[1] size (1, 2, 4), got [1, 3, 4]",
        )
        projected = (torch.zeros(1, 2, 4), torch.zeros(1, 2, 4))
        assert_same_error(
            lambda lib: lib.LSTM(3, 4, proj_size=2)(torch.zeros(5, 2, 3), projected),
            "Expected hidden[0] size (1, 2, 2), got [1, 2, 4]",
        )

    @pytest.mark.parametrize("name", LAYERS)
    def test_dimensions(self, name: str) -> None:
        got = "hx and cx should also be 3-D but got (2-D, 2-D) tensors"
        assert_same_error(
            lambda lib: getattr(lib, name)(3, 4)(torch.zeros(5, 2, 3), states(name, 1, 4)),
            "For batched 3-D input, "
            + (got if name == "LSTM" else "hx should also be 3-D but got 2-D tensor"),
        )
        assert_same_error(
            lambda lib: getattr(lib, name)(3, 4)(torch.zeros(5, 3), states(name, 1, 1, 4)),
            "For unbatched 2-D input, "
            + (
                "hx and cx should also be 2-D but got (3-D, 3-D) tensors"
                if name == "LSTM"
                else "hx should also be 2-D but got 3-D tensor"
            ),
        )

    @pytest.mark.parametrize("name", LAYERS)
    def test_no_steps(self, name: str) -> None:
        for shape, batch_first in (((0, 2, 3), False), ((2, 0, 3), True), ((0, 3), False)):
            assert_same_error(
                lambda lib: getattr(lib, name)(3, 4, batch_first=batch_first)(  # noqa: B023
                    torch.zeros(shape)  # noqa: B023
                ),
                "Expected sequence length to be larger than 0 in RNN",
            )

    def test_number_of_states(self) -> None:
        hx = torch.zeros(1, 2, 4)
        assert_same_error(lambda lib: lib.LSTM(3, 4)(torch.zeros(5, 2, 3), (hx, hx, hx)))


class TestCellErrors:
    @pytest.mark.parametrize("shape", [(), (2, 2, 3)], ids=str)
    @pytest.mark.parametrize("name", STEPS)
    def test_dimensions(self, name: str, shape: tuple[int, ...]) -> None:
        assert_same_error(
            lambda lib: getattr(lib, name)(3, 4)(torch.zeros(shape)),
            f"{name}: Expected input to be 1D or 2D, got {len(shape)}D instead",
        )
        assert_same_error(
            lambda lib: getattr(lib, name)(3, 4)(torch.zeros(2, 3), states(name, *shape)),
            f"{name}: Expected {'hx[0]' if name == 'LSTMCell' else 'hidden'} to be 1D or 2D, "
            f"got {len(shape)}D instead",
        )

    def test_second_state(self) -> None:
        hx = (torch.zeros(2, 4), torch.zeros(1, 2, 4))
        assert_same_error(
            lambda lib: lib.LSTMCell(3, 4)(torch.zeros(2, 3), hx), "LSTMCell: Expected hx[1]"
        )
        sizes = (torch.zeros(2, 4), torch.zeros(2, 5))
        assert_same_error(
            lambda lib: lib.LSTMCell(3, 4)(torch.zeros(2, 3), sizes),
            "hidden1 has inconsistent hidden_size: got 5, expected 4",
        )

    @pytest.mark.parametrize("name", STEPS)
    def test_sizes(self, name: str) -> None:
        def call(x: tuple[int, ...], hx: tuple[int, ...]) -> Callable[[Any], Any]:
            return lambda lib: getattr(lib, name)(10, 20)(torch.zeros(x), states(name, *hx))

        assert_same_error(
            call((3, 11), (3, 20)), "input has inconsistent input_size: got 11 expected 10"
        )
        assert_same_error(
            call((3, 10), (3, 21)), "hidden0 has inconsistent hidden_size: got 21, expected 20"
        )
        assert_same_error(
            call((3, 10), (5, 20)), "Input batch size 3 doesn't match hidden0 batch size 5"
        )

    @pytest.mark.parametrize("name", STEPS)
    def test_hidden_size_zero(self, name: str) -> None:
        ours = getattr(fastrnn, name)(3, 0)
        check(ours, torch.zeros(2, 3))


class TestDeviceErrors:
    @pytest.mark.parametrize("name", LAYERS)
    def test_parameters(self, name: str) -> None:
        assert_same_error(
            lambda lib: getattr(lib, name)(3, 4)(torch.zeros(5, 2, 3, device="meta")),
            "Input and parameter tensors are not at the same device",
        )

    @pytest.mark.parametrize("name", LAYERS)
    def test_states(self, name: str) -> None:
        assert_same_error(
            lambda lib: getattr(lib, name)(3, 4)(
                torch.zeros(5, 2, 3), states(name, 1, 2, 4, device="meta")
            ),
            "Input and hidden tensors are not at the same device",
        )

    @pytest.mark.parametrize("name", STEPS)
    def test_cells(self, name: str) -> None:
        with pytest.raises(RuntimeError, match="not at the same device"):
            getattr(fastrnn, name)(3, 4)(torch.zeros(2, 3, device="meta"))
        with pytest.raises(RuntimeError, match="not the same dtype"):
            getattr(fastrnn, name)(3, 4)(torch.zeros(2, 3, dtype=torch.float64))


class TestDtypes:
    """Values and gradients in every dtype are compared in test_modules and test_properties."""

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("name", [*LAYERS, *STEPS])
    def test_is_torch(self, name: str, dtype: torch.dtype, device: str) -> None:
        module = getattr(fastrnn, name)(3, 4, dtype=dtype, device=device)
        shape = (2, 3) if name in STEPS else (5, 2, 3)
        check(module, torch.randn(shape, dtype=dtype, device=device, requires_grad=True))

    @pytest.mark.parametrize("name", [*LAYERS, *STEPS])
    def test_complex(self, name: str) -> None:
        module = getattr(fastrnn, name)(3, 4, dtype=torch.complex128)
        shape = (2, 3) if name in STEPS else (5, 2, 3)
        x = torch.randn(shape, dtype=torch.complex128)
        gradients, outputs = [], []
        for m in (module, torch_twin(module)):
            result = m(x)
            outputs.append(result if isinstance(result, Tensor) else result[0])
            loss = outputs[-1].abs().square().sum()
            gradients.append(torch.autograd.grad(loss, list(m.parameters())))
        assert_same_in_double(*outputs)
        assert_same_in_double(*gradients)


class TestAutocast:
    """test_autocast has further tests."""

    def test_hidden_of_another_dtype(self) -> None:
        module = fastrnn.LSTM(3, 4)
        hx = (torch.zeros(1, 2, 4, dtype=torch.float16), torch.zeros(1, 2, 4))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            output, _ = module(torch.randn(5, 2, 3, dtype=torch.bfloat16), hx)
            output.sum().backward()
        assert output.dtype == torch.bfloat16
        assert module.weight_hh_l0.grad.dtype == torch.float32

    def test_float64_is_not_cast(self) -> None:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            output, _ = fastrnn.GRU(3, 4, dtype=torch.float64)(torch.ones(5, 2, 3).double())
        assert output.dtype == torch.float64

    def test_backward_inside_autocast_keeps_its_precision(self) -> None:
        module = fastrnn.GRU(3, 4)
        x = torch.randn(5, 2, 3)
        with torch.autocast("cpu", enabled=False):
            expected = run(module, x)
        weights = list(module.parameters())
        torch.manual_seed(0)
        output, h_n = module(x)
        generator = torch.Generator().manual_seed(0)
        loss_weights = [
            (torch.randn(o.shape, generator=generator, dtype=torch.float64).abs() + 0.5).float()
            for o in (output, h_n)
        ]
        with torch.autocast("cpu", dtype=torch.bfloat16):
            got = torch.autograd.grad([output, h_n], weights, loss_weights)
        for value, (name, _) in zip(got, module.named_parameters(), strict=True):
            assert torch.equal(value, expected[f"d_{name}"])


class TestNnUtils:
    """Gradients reach the Parameters from which weights are computed."""

    def compare(self, prepare: Callable[[nn.Module], Any], name: str) -> None:
        ours = getattr(fastrnn, name)(3, 4, 2, dtype=torch.float64)
        theirs = torch_twin(ours)
        x = torch.randn(5, 2, 3, dtype=torch.float64)
        for module in (ours, theirs):
            torch.manual_seed(1)
            prepare(module)
        assert [n for n, _ in ours.named_parameters()] == [n for n, _ in theirs.named_parameters()]
        for _ in range(2):  # the second call uses the state that the first one left
            got, expected = run(ours, x), run(theirs, x)
            assert got.keys() == expected.keys()
            for key, value in expected.items():
                assert_same_in_double(got[key], value)
            with torch.no_grad():
                for module in (ours, theirs):
                    for parameter in module.parameters():
                        parameter.mul_(1.5)
        assert len(expected) > 5

    @pytest.mark.parametrize("name", LAYERS)
    def test_prune(self, name: str) -> None:
        self.compare(lambda m: prune.l1_unstructured(m, "weight_hh_l1", 0.5), name)

    @pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
    @pytest.mark.parametrize("name", LAYERS)
    def test_weight_norm_old(self, name: str) -> None:
        self.compare(lambda m: nn.utils.weight_norm(m, "weight_hh_l0"), name)

    @pytest.mark.parametrize("name", LAYERS)
    def test_weight_norm(self, name: str) -> None:
        self.compare(lambda m: parametrizations.weight_norm(m, "weight_hh_l0"), name)

    @pytest.mark.parametrize("name", LAYERS)
    def test_spectral_norm(self, name: str) -> None:
        self.compare(lambda m: parametrizations.spectral_norm(m.eval(), "weight_ih_l1"), name)

    @pytest.mark.parametrize("name", LAYERS)
    def test_tied_weights(self, name: str) -> None:
        def tie(module: nn.Module) -> None:
            module.weight_hh_l1 = module.weight_hh_l0

        self.compare(tie, name)

    @pytest.mark.parametrize("name", STEPS)
    def test_cells(self, name: str) -> None:
        ours = getattr(fastrnn, name)(3, 4, dtype=torch.float64)
        theirs = getattr(nn, name)(3, 4, dtype=torch.float64)
        theirs.load_state_dict(ours.state_dict())
        for module in (ours, theirs):
            parametrizations.weight_norm(module, "weight_hh")
            prune.l1_unstructured(module, "weight_ih", 0.5)
        x = torch.randn(2, 3, dtype=torch.float64)
        got, expected = run(ours, x), run(theirs, x)
        for key, value in expected.items():
            assert_same_in_double(got[key], value)

    @pytest.mark.parametrize("name", LAYERS)
    def test_functional_call_and_back(self, name: str) -> None:
        module = getattr(fastrnn, name)(3, 4)
        x = torch.randn(5, 2, 3)
        before = module(x)[0]
        others = {n: torch.randn_like(p).requires_grad_() for n, p in module.named_parameters()}
        output = torch.func.functional_call(module, others, (x,))[0]
        output.sum().backward()
        assert all(other.grad is not None for other in others.values())
        assert all(p.grad is None for p in module.parameters())
        assert torch.equal(module(x)[0], before)

    def test_clip_grad_norm_scales_each_gradient_once(self) -> None:
        module = fastrnn.LSTM(3, 4)
        module(torch.randn(5, 2, 3))[0].square().sum().backward()
        nn.utils.clip_grad_norm_(module.parameters(), 1e-3)
        norm = torch.stack([p.grad.norm() for p in module.parameters()]).norm()
        assert norm.item() == pytest.approx(1e-3, rel=1e-3)  # a second scaling is off by far


class TestSubclassing:
    @pytest.mark.parametrize("name", LAYERS)
    def test_overridden_reset_parameters(self, name: str) -> None:
        class Mine(getattr(fastrnn, name)):  # type: ignore[misc]
            def reset_parameters(self) -> None:
                for parameter in self.parameters():
                    nn.init.constant_(parameter, self.hidden_size)

        module = Mine(3, 4)
        assert torch.equal(module.weight_hh_l0, torch.full_like(module.weight_hh_l0, 4.0))
        check_subclass(module)

    def test_reset_parameters_sees_the_nonlinearity(self) -> None:
        seen = []

        class Mine(fastrnn.RNN):
            def reset_parameters(self) -> None:
                seen.append(self.nonlinearity)

        Mine(3, 4, nonlinearity="relu")
        assert seen == ["relu"]

    @pytest.mark.parametrize("name", LAYERS)
    def test_mixin_between_base_and_module(self, name: str) -> None:
        """Covers class Base(nn.RNNBase) with an __init__, and class LSTM(Base, fastrnn.LSTM)."""

        class Base(nn.RNNBase):
            def __init__(self, *args: Any, extra: int = 7, **kwargs: Any) -> None:
                super().__init__(*args, **kwargs)
                self.extra = extra

        mixed = type(name, (Base, getattr(fastrnn, name)), {})
        module = mixed(3, 4, 2, extra=9)
        assert module.extra == 9
        assert isinstance(module, nn.RNNBase)
        check_subclass(module)

        late = type(name, (getattr(fastrnn, name), Base), {})
        assert late(3, 4).extra == 7
        check_subclass(late(3, 4))

    @pytest.mark.parametrize("name", LAYERS)
    def test_super_forward(self, name: str) -> None:
        class Doubled(getattr(fastrnn, name)):  # type: ignore[misc]
            def forward(self, input: Tensor, hx: Any = None) -> Any:
                output, hidden = super().forward(input, hx)
                return output * 2, hidden

        module = Doubled(3, 4)
        x = torch.randn(5, 2, 3)
        plain = getattr(fastrnn, name)(3, 4)
        plain.load_state_dict(module.state_dict())
        assert torch.equal(module(x)[0], plain(x)[0] * 2)

    @pytest.mark.parametrize("name", LAYERS)
    def test_overridden_checks_are_called(self, name: str) -> None:
        calls = []

        class Mine(getattr(fastrnn, name)):  # type: ignore[misc]
            def check_forward_args(self, *args: Any) -> None:
                calls.append(args)
                super().check_forward_args(*args)

        Mine(3, 4)(torch.randn(5, 2, 3))
        assert len(calls) == 1

    @pytest.mark.parametrize("name", [*LAYERS, *STEPS])
    def test_attributes_copied_from_the_class(self, name: str) -> None:
        """Some wrappers build a class from the dictionary of another class."""
        cls = getattr(fastrnn, name)
        copied = type(name, cls.__bases__, {**vars(cls)})
        assert "forward" in vars(copied)
        module = cls(3, 4)
        x = torch.ones(2, 3) if name in STEPS else torch.ones(5, 2, 3)
        expected = tree_leaves(module(x))
        module.__class__ = copied
        for got, value in zip(tree_leaves(module(x)), expected, strict=True):
            assert torch.equal(got, value)


def check_subclass(module: nn.Module) -> None:
    base = next(c for c in type(module).__mro__ if c in (fastrnn.RNN, fastrnn.LSTM, fastrnn.GRU))
    plain = base(module.input_size, module.hidden_size, module.num_layers)
    plain.load_state_dict(module.state_dict())
    x = torch.randn(5, 2, module.input_size)
    assert torch.equal(module(x)[0], plain(x)[0])


def test_package_imports_with_torch_alone() -> None:
    """Importing fastrnn loads no optional package."""
    code = (
        "import sys, torch; before = set(sys.modules); import fastrnn; "
        "new = {n.partition('.')[0] for n in set(sys.modules) - before}; "
        "print(sorted(new & {'numpy', 'matplotlib', 'rich', 'safetensors', 'hypothesis'}))"
    )
    assert run_python(code) == "[]"

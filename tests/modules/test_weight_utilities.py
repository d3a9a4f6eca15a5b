"""torch's utilities for weights work on fastrnn's modules as on torch.nn's.

Each utility is applied to a module of each library. Then both modules run twice, and the weights
change in between. Calls without gradients take the fast path, which must not use old weights.
"""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from support import run, torch_twin
from tolerance import assert_same_in_double
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune

import fastrnn

LAYERS = ["RNN", "LSTM", "GRU"]
STEPS = ["RNNCell", "LSTMCell", "GRUCell"]
#: one layer, whose calls without gradients take the fast path, and two layers
DEPTHS = [1, 2]

pytestmark = pytest.mark.usefixtures("one_thread")

Module = Any
Change = Callable[[Module], Any]  # returns the module to go on with, or None for the same


@pytest.fixture(params=[*((name, depth) for name in LAYERS for depth in DEPTHS), *STEPS], ids=str)
def pair(request: pytest.FixtureRequest) -> tuple[Module, Module]:
    """Returns fastrnn's module and torch's with the same weights, in float64; I = H = 4."""
    torch.manual_seed(17)
    if isinstance(request.param, str):
        module = getattr(fastrnn, request.param)(4, 4, dtype=torch.float64)
    else:
        name, depth = request.param
        module = getattr(fastrnn, name)(4, 4, depth, dtype=torch.float64)
    return module, torch_twin(module)


def weight_hh(module: Module) -> str:
    """Returns the name of the last layer's recurrent weight."""
    return (
        "weight_hh" if isinstance(module, nn.RNNCellBase) else f"weight_hh_l{module.num_layers - 1}"
    )


def weight_ih(module: Module) -> str:
    return weight_hh(module).replace("hh", "ih")


def example(module: Module) -> Tensor:
    generator = torch.Generator().manual_seed(5)
    shape = (2, 4) if isinstance(module, nn.RNNCellBase) else (5, 2, 4)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def outputs(module: Module) -> tuple[Tensor, ...]:
    """Returns all outputs of a call without gradients, in a flat list."""
    with torch.no_grad():
        result = module(example(module))
    if isinstance(result, Tensor):
        return (result,)
    first, second = result
    return (first, second) if isinstance(second, Tensor) else (first, *second)


def assert_same(ours: Module, theirs: Module) -> dict[str, Tensor]:
    """Compares outputs and gradients, with and without gradients, in training and evaluation."""
    assert type(ours).__name__ == type(theirs).__name__
    result = {}
    for is_training in (True, False):
        ours.train(is_training)
        theirs.train(is_training)
        assert_same_in_double(outputs(ours), outputs(theirs))
        result, expected = run(ours, example(ours)), run(theirs, example(theirs))
        assert result.keys() == expected.keys()
        assert_same_in_double(result, expected)
    return result


def compare(pair: tuple[Module, Module], change: Change) -> tuple[Module, Module]:
    """Applies ``change`` to both. Compares before it, after it, and after the weights change."""
    ours, theirs = pair
    before = assert_same(ours, theirs)
    changed = []
    for module in (ours, theirs):
        torch.manual_seed(1)
        result = change(module)
        changed.append(module if result is None else result)
    ours, theirs = changed
    assert [n for n, _ in ours.named_parameters()] == [n for n, _ in theirs.named_parameters()]
    after = assert_same(ours, theirs)
    assert any(name.startswith(("d_weight", "d_param")) for name in after)
    scale(changed)
    last = assert_same(ours, theirs)
    assert not torch.equal(last["out"] if "out" in last else last["out0"], first_of(before))
    return ours, theirs


def first_of(result: dict[str, Tensor]) -> Tensor:
    return result["out"] if "out" in result else result["out0"]


def scale(modules: list[Module]) -> None:
    """Changes the weights in place, as an optimizer does."""
    with torch.no_grad():
        for module in modules:
            for parameter in module.parameters():
                parameter.mul_(1.25).add_(0.03125)


class TestComputedWeights:
    """Utilities that replace Parameters by computed tensors: values and gradients agree."""

    def test_prune_and_make_it_permanent(self, pair: tuple[Module, Module]) -> None:
        def change(module: Module) -> None:
            prune.l1_unstructured(module, weight_hh(module), 0.5)

        ours, theirs = compare(pair, change)
        assert (getattr(ours, weight_hh(ours)) == 0).sum() >= getattr(
            ours, weight_hh(ours)
        ).numel() // 2
        compare((ours, theirs), lambda m: prune.remove(m, weight_hh(m)))
        assert not prune.is_pruned(ours)

    def test_prune_twice_and_structured(self, pair: tuple[Module, Module]) -> None:
        def change(module: Module) -> None:
            prune.random_unstructured(module, weight_ih(module), 3)
            prune.ln_structured(module, weight_ih(module), 0.25, n=2, dim=0)

        compare(pair, change)

    def test_prune_globally(self, pair: tuple[Module, Module]) -> None:
        def change(module: Module) -> None:
            prune.global_unstructured(
                [(module, weight_ih(module)), (module, weight_hh(module))],
                prune.L1Unstructured,
                amount=0.3,
            )

        compare(pair, change)

    @pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
    def test_weight_norm_old(self, pair: tuple[Module, Module]) -> None:
        changed = compare(pair, lambda m: nn.utils.weight_norm(m, weight_hh(m)))
        compare(changed, lambda m: nn.utils.remove_weight_norm(m, weight_hh(m)))

    def test_weight_norm(self, pair: tuple[Module, Module]) -> None:
        changed = compare(pair, lambda m: parametrizations.weight_norm(m, weight_hh(m)))
        compare(changed, unparametrize)

    @pytest.mark.filterwarnings("ignore:.*spectral_norm.*:FutureWarning")
    def test_spectral_norm_old(self, pair: tuple[Module, Module]) -> None:
        changed = compare(pair, lambda m: nn.utils.spectral_norm(m, weight_hh(m)))
        compare(changed, lambda m: nn.utils.remove_spectral_norm(m, weight_hh(m)))

    def test_spectral_norm(self, pair: tuple[Module, Module]) -> None:
        # torch.nn runs four steps of the power iteration per call, fastrnn the intended one.
        # Enough calls for both to converge.
        def change(module: Module) -> None:
            parametrizations.spectral_norm(module, weight_hh(module), n_power_iterations=500)

        compare(compare(pair, change), unparametrize)

    def test_orthogonal(self, pair: tuple[Module, Module]) -> None:
        ours, theirs = compare(pair, lambda m: parametrizations.orthogonal(m, weight_hh(m)))
        w = getattr(ours, weight_hh(ours))
        assert_same_in_double(w.T @ w, torch.eye(4, dtype=torch.float64))
        compare((ours, theirs), unparametrize)

    def test_computed_weight_is_computed_once_per_call(self, pair: tuple[Module, Module]) -> None:
        class Counting(nn.Module):
            calls = 0

            def forward(self, x: Tensor) -> Tensor:
                self.calls += 1
                return x * 2

        module, counting = pair[0], Counting()
        parametrize.register_parametrization(module, weight_hh(module), counting)
        for is_recorded in (True, False):
            counting.calls = 0
            with torch.set_grad_enabled(is_recorded):
                module(example(module))
            assert counting.calls == 1

    def test_parametrized_cached(self, pair: tuple[Module, Module]) -> None:
        ours, theirs = pair
        for module in pair:
            parametrizations.weight_norm(module, weight_hh(module))
        with parametrize.cached():
            assert_same(ours, theirs)
        scale(list(pair))
        assert_same(ours, theirs)


def unparametrize(module: Module) -> None:
    parametrize.remove_parametrizations(module, weight_hh(module))


class TestSharedWeights:
    def test_within_a_module(self, pair: tuple[Module, Module]) -> None:
        def tie(module: Module) -> None:
            setattr(module, weight_ih(module), getattr(module, weight_hh(module)))

        ours, _ = compare(pair, tie)
        assert getattr(ours, weight_ih(ours)) is getattr(ours, weight_hh(ours))

    def test_between_two_modules(self, pair: tuple[Module, Module]) -> None:
        """The gradient of a shared weight is the sum over both users of it."""
        others = [copy.deepcopy(module) for module in pair]
        scale(others)
        gradients = []
        for module, other in zip(pair, others, strict=True):
            setattr(other, weight_hh(other), getattr(module, weight_hh(module)))
            x = example(module)
            result = [m(x) for m in (module, other)]
            sum(r.sum() if isinstance(r, Tensor) else r[0].sum() for r in result).backward()
            gradients.append({n: p.grad for n, p in module.named_parameters()})
        assert_same_in_double(gradients[0], gradients[1])
        scale([pair[0], pair[1]])
        assert_same(*others)


class TestOptimizerUtilities:
    def gradients(self, pair: tuple[Module, Module]) -> None:
        for module in pair:
            result = module(example(module))
            (result if isinstance(result, Tensor) else result[0]).square().sum().backward()

    @pytest.mark.parametrize("foreach", [True, False])
    def test_clip_grad_norm(self, pair: tuple[Module, Module], foreach: bool) -> None:
        self.gradients(pair)
        norms = [nn.utils.clip_grad_norm_(m.parameters(), 1e-3, foreach=foreach) for m in pair]
        assert_same_in_double(norms[0], norms[1])
        clipped = [[p.grad for p in module.parameters()] for module in pair]
        assert_same_in_double(clipped[0], clipped[1])
        assert nn.utils.get_total_norm(clipped[0]) < 1.01e-3 < norms[0]

    def test_clip_grad_value(self, pair: tuple[Module, Module]) -> None:
        self.gradients(pair)
        for module in pair:
            nn.utils.clip_grad_value_(module.parameters(), 1e-2)
        clipped = [[p.grad for p in module.parameters()] for module in pair]
        assert_same_in_double(clipped[0], clipped[1])
        assert max(gradient.abs().max() for gradient in clipped[0]) == 1e-2

    def test_vector_and_back(self, pair: tuple[Module, Module]) -> None:
        def change(module: Module) -> None:
            vector = nn.utils.parameters_to_vector(module.parameters())
            assert vector.numel() == sum(p.numel() for p in module.parameters())
            nn.utils.vector_to_parameters(vector.detach() * 0.5, module.parameters())

        compare(pair, change)

    @pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.Adam])
    def test_training(self, pair: tuple[Module, Module], optimizer: Any) -> None:
        optimizers = [optimizer(module.parameters(), lr=0.01) for module in pair]
        for _ in range(3):
            self.gradients(pair)
            for one in optimizers:
                one.step()
                one.zero_grad()
            assert_same(*pair)

    def test_averaged_model(self, pair: tuple[Module, Module]) -> None:
        averages = [torch.optim.swa_utils.AveragedModel(module) for module in pair]
        for _ in range(2):
            scale(list(pair))
            for average, module in zip(averages, pair, strict=True):
                average.update_parameters(module)
        assert_same(averages[0].module, averages[1].module)


class TestCopies:
    def test_deepcopy(self, pair: tuple[Module, Module]) -> None:
        self.compare(pair, copy.deepcopy)

    def test_pickle(self, pair: tuple[Module, Module]) -> None:
        self.compare(pair, lambda module: pickle.loads(pickle.dumps(module)))

    def test_saved_module(self, pair: tuple[Module, Module]) -> None:
        def reload(module: Module) -> Any:
            return torch.load(saved(module), weights_only=False)

        self.compare(pair, reload)

    def test_saved_module_by_allowed_classes_alone(self, pair: tuple[Module, Module]) -> None:
        """A whole module loads with ``weights_only=True`` if its class is allowed."""
        ours, theirs = pair
        buffer = saved(ours)
        names = torch.serialization.get_unsafe_globals_in_checkpoint(buffer)
        assert all(name.startswith(("fastrnn.modules.", "torch.")) for name in names) or not names
        buffer.seek(0)
        with torch.serialization.safe_globals([type(ours)]):
            loaded = torch.load(buffer, weights_only=True)
        assert_same(loaded, theirs)

    def compare(self, pair: tuple[Module, Module], duplicate: Change) -> None:
        ours, _ = pair
        copies = compare(pair, duplicate)
        # changes of the copies do not affect the originals, nor the reverse
        for copied, original in zip(copies[0].parameters(), ours.parameters(), strict=True):
            assert not torch.equal(copied, original)
        assert_same(*pair)
        scale(list(pair))
        assert_same(*pair)


def saved(value: Any) -> io.BytesIO:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    buffer.seek(0)
    return buffer


class TestStateDicts:
    @pytest.mark.parametrize("assign", [False, True])
    @pytest.mark.parametrize("mmap", [False, True])
    def test_saved_by_one_and_loaded_by_the_other(
        self, pair: tuple[Module, Module], assign: bool, mmap: bool, tmp_path: Any
    ) -> None:
        for source, target in (pair, pair[::-1]):
            outputs(target)
            scale([source])
            file = tmp_path / f"{id(source)}.pt"  # one file per load: weights may be mapped to it
            torch.save(source.state_dict(), file)
            state = torch.load(file, weights_only=True, mmap=mmap)
            loaded = target.load_state_dict(state, assign=assign)
            assert not loaded.missing_keys
            assert not loaded.unexpected_keys
            assert_same(*pair)

    def test_assigned_tensors_are_the_parameters(self, pair: tuple[Module, Module]) -> None:
        ours, theirs = pair
        state = {name: value.clone() * 2 for name, value in theirs.state_dict().items()}
        theirs.load_state_dict(state)
        outputs(ours)
        ours.load_state_dict(state, assign=True)
        for name, value in state.items():
            assert getattr(ours, name).data_ptr() == value.data_ptr()
            assert getattr(ours, name).requires_grad
        assert_same(*pair)

    @pytest.mark.parametrize("assign", [False, True])
    def test_swapped_tensors(
        self, pair: tuple[Module, Module], assign: bool, request: pytest.FixtureRequest
    ) -> None:
        """torch.nn's layers raise, because they hold weak references to their weights."""
        ours, theirs = pair
        state = {name: value.clone() * 2 for name, value in theirs.state_dict().items()}
        theirs.load_state_dict(state)
        outputs(ours)
        parameters = list(ours.parameters())
        request.getfixturevalue("swapping")
        ours.load_state_dict(state, assign=assign)
        assert all(a is b for a, b in zip(parameters, ours.parameters(), strict=True))
        assert_same(*pair)


class TestFunctionalCall:
    @pytest.mark.parametrize("tie_weights", [True, False])
    def test_other_weights_for_one_call(
        self, pair: tuple[Module, Module], tie_weights: bool
    ) -> None:
        others = {n: (p.detach() * 2).requires_grad_() for n, p in pair[0].named_parameters()}
        results = []
        for module in pair:
            x = example(module)
            for parameter in module.parameters():
                parameter.grad = None
            result = torch.func.functional_call(module, others, (x,), tie_weights=tie_weights)
            first = result if isinstance(result, Tensor) else result[0]
            gradients = torch.autograd.grad(first.sum(), list(others.values()))
            with torch.no_grad():
                quick = torch.func.functional_call(module, others, (x,))
            results.append((result, gradients, quick))
            assert all(p.grad is None for p in module.parameters())
        assert_same_in_double(results[0], results[1])
        assert_same_in_double(results[0][0], results[0][2])
        assert_same(*pair)

    def test_some_weights(self, pair: tuple[Module, Module]) -> None:
        results = []
        for module in pair:
            name = weight_hh(module)
            other = (getattr(module, name).detach() * 2).requires_grad_()
            with torch.no_grad():
                results.append(
                    torch.func.functional_call(module, {name: other}, (example(module),))
                )
        assert_same_in_double(results[0], results[1])
        assert_same(*pair)

    @pytest.mark.filterwarnings("ignore:.*functional_call.*:FutureWarning")
    def test_stateless(self, pair: tuple[Module, Module]) -> None:
        others = {n: p.detach() * 2 for n, p in pair[0].named_parameters()}
        results = [
            nn.utils.stateless.functional_call(module, others, (example(module),))
            for module in pair
        ]
        assert_same_in_double(results[0], results[1])
        assert_same(*pair)

    def test_stacked_weights(self, pair: tuple[Module, Module]) -> None:
        """Runs an ensemble by `stack_module_state` and `vmap`, which torch.nn does not support."""
        ours = [pair[0], copy.deepcopy(pair[0])]
        scale(ours[1:])
        params, buffers = torch.func.stack_module_state(ours)
        x = example(ours[0])

        def call(params: Any, buffers: Any) -> Any:
            result = torch.func.functional_call(ours[0], (params, buffers), (x,))
            return result if isinstance(result, Tensor) else result[0]

        together = torch.vmap(call)(params, buffers)
        for index, module in enumerate(ours):
            assert_same_in_double(together[index], outputs(module)[0])


@pytest.fixture
def swapping() -> Iterator[None]:
    before = torch.__future__.get_swap_module_params_on_conversion()
    torch.__future__.set_swap_module_params_on_conversion(True)
    yield
    torch.__future__.set_swap_module_params_on_conversion(before)


@pytest.fixture
def overwriting() -> Iterator[None]:
    """``module.to`` makes new Parameters instead of changing ``.data``."""
    before = torch.__future__.get_overwrite_module_params_on_conversion()
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    yield
    torch.__future__.set_overwrite_module_params_on_conversion(before)


class TestConversions:
    @pytest.mark.parametrize("way", ["data", "swapping", "overwriting"])
    def test_to_and_back(
        self, pair: tuple[Module, Module], way: str, request: pytest.FixtureRequest
    ) -> None:
        if way != "data":
            request.getfixturevalue(way)

        def change(module: Module) -> None:
            outputs(module)
            parameters = list(module.parameters())
            assert module.to(torch.float32) is module
            kept = [a is b for a, b in zip(parameters, module.parameters(), strict=True)]
            assert kept == [way != "overwriting"] * len(kept)
            with torch.no_grad():
                result = module(example(module).float())
            assert (result if isinstance(result, Tensor) else result[0]).dtype == torch.float32
            module.double()

        compare(pair, change)

    def test_data_is_replaced(self, pair: tuple[Module, Module]) -> None:
        def change(module: Module) -> None:
            weight = getattr(module, weight_hh(module))
            weight.data = weight.data.t().contiguous().t() * 0.5  # other strides as well

        compare(pair, change)

    def test_new_parameter_is_used(self, pair: tuple[Module, Module]) -> None:
        def change(module: Module) -> None:
            name = weight_hh(module)
            outputs(module)
            setattr(module, name, nn.Parameter(getattr(module, name).detach() * 0.5))

        compare(pair, change)

    def test_parameter_registered_again_is_used(self, pair: tuple[Module, Module]) -> None:
        """``register_parameter`` bypasses ``__setattr__``, but the next call uses the parameter."""
        ours, theirs = pair
        for module in pair:
            name = weight_hh(module)
            outputs(module)
            other = nn.Parameter(getattr(module, name).detach() * 0.5)
            module.register_parameter(name, other)
        assert_same_in_double(outputs(ours), outputs(theirs))
        assert_same(ours, theirs)


class TestWithoutInitialisation:
    @pytest.mark.parametrize("name", STEPS)
    def test_skip_init(self, name: str) -> None:
        state = getattr(nn, name)(4, 4, dtype=torch.float64).state_dict()
        pair = []
        for namespace in (fastrnn, nn):
            module = nn.utils.skip_init(getattr(namespace, name), 4, 4, dtype=torch.float64)
            assert all(p.device.type == "cpu" for p in module.parameters())
            module.load_state_dict(state)
            pair.append(module)
        assert_same(*pair)

    @pytest.mark.parametrize("name", LAYERS)
    def test_skip_init_rejects_layers(self, name: str) -> None:
        """skip_init looks for an argument named "device", which torch's layers hide in *args."""
        for namespace in (fastrnn, nn):
            with pytest.raises(RuntimeError, match="must support a 'device' arg"):
                nn.utils.skip_init(getattr(namespace, name), 4, 4)

    @pytest.mark.parametrize("name", [*LAYERS, *STEPS])
    def test_meta_then_empty(self, name: str) -> None:
        pair = []
        for namespace in (fastrnn, nn):
            with torch.device("meta"):
                module = getattr(namespace, name)(4, 4, dtype=torch.float64)
            assert all(p.is_meta for p in module.parameters())
            assert module.to_empty(device="cpu") is module
            torch.manual_seed(3)
            module.reset_parameters()
            pair.append(module)
        assert_same(*pair)

    @pytest.mark.parametrize("name", [*LAYERS, *STEPS])
    def test_meta_then_assign(self, name: str) -> None:
        state = getattr(nn, name)(4, 4, dtype=torch.float64).state_dict()
        pair = []
        for namespace in (fastrnn, nn):
            module = getattr(namespace, name)(4, 4, device="meta", dtype=torch.float64)
            module.load_state_dict(state, assign=True)
            pair.append(module)
        assert_same(*pair)

    @pytest.mark.parametrize("name", [*LAYERS, *STEPS])
    def test_meta_output(self, name: str) -> None:
        module = getattr(fastrnn, name)(4, 4, device="meta", dtype=torch.float64)
        twin = getattr(nn, name)(4, 4, dtype=torch.float64)
        x = example(module)
        for is_recorded in (True, False):
            with torch.set_grad_enabled(is_recorded):
                result, expected = module(x.to("meta")), twin(x)
            if not isinstance(result, Tensor):
                result, expected = result[0], expected[0]
            assert result.is_meta
            assert result.shape == expected.shape

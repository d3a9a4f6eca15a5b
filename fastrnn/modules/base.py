"""Base class of the recurrent modules: torch's contract for inputs, states and weights."""

from __future__ import annotations

import weakref
from operator import is_
from types import NoneType
from typing import Any, ClassVar, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from fastrnn import checks
from fastrnn.backends import prepared as prepared_backend
from fastrnn.backends import torch_step
from fastrnn.cuda_session import CudaSession
from fastrnn.engine import choose
from fastrnn.engine.ragged import NO_MARKS, Marks, as_ragged, run_marked
from fastrnn.engine.run import run
from fastrnn.engine.states import Extras, Recorder, map_extras, recorder_of, untraced
from fastrnn.layer_call import (
    DEFAULTS,
    PADDED,
    LayerCall,
    Options,
    SequenceMembers,
    SequenceTensors,
)
from fastrnn.modules import cell_options
from fastrnn.modules.batch_first_states import batch_first, layers_first
from fastrnn.modules.cell_options import ModuleOptions
from fastrnn.modules.quantization_warning import warn_if_left_float
from fastrnn.ops import HALF, forward_op, kernel_layer, ragged_layer, raise_unless_rejected
from fastrnn.ops.packed import PreparedWeights, StackShape
from fastrnn.session import Session
from fastrnn.spec import (
    BIASES,
    BY_MODE,
    MATRICES,
    PROJECTION,
    WEIGHT_FORMATS,
    Weights,
    plain_spec,
    slots_of_names,
)
from fastrnn.tracing import (
    check_scriptable,
    is_tracing,
    leaf_call,
    size,
    without_tracing,
)

# [L*D,B,R], or for an LSTM a pair of that and [L*D,B,H]
Hidden = Any

_Module = TypeVar("_Module", bound="RecurrentBase")

# the arguments of nn.RNNBase after ``mode``
_ARGUMENTS = (
    "input_size",
    "hidden_size",
    "num_layers",
    "bias",
    "batch_first",
    "dropout",
    "bidirectional",
    "proj_size",
    "device",
    "dtype",
)


class RecurrentBase(nn.RNNBase):
    """A stack of recurrent layers over whole sequences.

    Derives from ``nn.RNNBase``, which provides parameters, their names and order, initialisation,
    checks, pickling and replication. Does not derive from ``nn.LSTM`` or ``nn.GRU``, because Dynamo
    does not trace their subclasses. Instances have only torch's attributes, so that a module can
    change its class and old pickles load. An attribute that fastrnn adds must therefore have a
    default on the class.
    """

    _wrong_input_message: ClassVar[str]
    _weight_dtype: torch.dtype | None = None
    # without an annotation, which TorchScript would read
    _prepared = cast("PreparedWeights | None", None)
    _learns_initial_state = False
    _recompute = cast("int | str", "none")
    _residual = False
    _batch_first_states = False
    _cell_options = cast("ModuleOptions | None", None)
    _overrides_checks: ClassVar[bool] = False

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "check_forward_args" in cls.__dict__ and not cls.__module__.startswith("fastrnn."):
            cls._overrides_checks = True

    def __init__(
        self,
        mode: str,
        *args: Any,
        weight_dtype: torch.dtype | None = None,
        learn_initial_state: bool = False,
        recompute: int | str = "none",
        residual: bool = False,
        batch_first_states: bool = False,
        layer_norm: bool = False,
        zoneout: float | tuple[float, float] = 0.0,
        recurrent_dropout: float = 0.0,
        weight_dropout: float = 0.0,
        peephole: bool = False,
        coupled_gates: bool = False,
        cell_clip: float | None = None,
        proj_clip: float | None = None,
        gate_activation: str = "sigmoid",
        reset_after: bool = True,
        heads: int = 1,
        **kwargs: Any,
    ) -> None:
        self.weight_dtype = weight_dtype
        self.recompute = recompute
        try:
            checks.check_num_layers(
                type(self).__name__, kwargs.get("num_layers", args[2] if len(args) > 2 else 1)
            )
            is_in_torch = BY_MODE[mode].torch.torch_function is not None
            super().__init__(mode if is_in_torch else "RNN_TANH", *args, **kwargs)
            if not is_in_torch:
                self._change_cell(mode)
            if not checks.is_bool(self.bidirectional):  # torch.nn would raise at the first call
                name = type(self.bidirectional).__name__
                raise TypeError(f"bidirectional should be of type bool, got: {name}")
            for option, value in (
                ("learn_initial_state", learn_initial_state),
                ("residual", residual),
                ("batch_first_states", batch_first_states),
            ):
                if not checks.is_bool(value):
                    name = type(value).__name__
                    raise TypeError(f"{option} should be of type bool, got: {name}")
            if residual:
                self._residual = True
            if batch_first_states:
                self._batch_first_states = True
            options = cell_options.parse(
                type(self).__name__,
                BY_MODE[mode],
                layer_norm,
                zoneout,
                recurrent_dropout,
                weight_dropout,
                peephole,
                coupled_gates,
                self.hidden_size,
                cell_clip,
                proj_clip,
                gate_activation,
                reset_after,
                heads,
            )
            if options is not None:
                cell_options.check_together(self, options, self._recompute)
                self._cell_options = options
                self.mode = options.mode(BY_MODE[mode])
                if coupled_gates:
                    self._set_gates(3)
                if options.heads > 1:
                    cell_options.divide_recurrent_weights(self, options.heads)
                if layer_norm:
                    cell_options.add_norm_parameters(self, BY_MODE[mode].has_cell_state)
                if peephole:
                    cell_options.add_peepholes(self, options)
            if learn_initial_state:
                self._add_initial_state()
        except Exception:
            checks.explain_constructor(type(self).__name__, _ARGUMENTS, args, kwargs)
            raise

    def _change_cell(self, mode: str) -> None:
        """Changes a new RNN of torch, which has one gate, to a cell that torch does not have."""
        self.mode = mode
        spec = BY_MODE[mode]
        if not spec.dense:
            self._all_weights = [
                [name for name in names if "_hh_" not in name] for names in self._all_weights
            ]
            self._flat_weights_names = [name for names in self._all_weights for name in names]
            for name in [name for name in self._parameters if "_hh_" in name]:
                del self._parameters[name]
        if spec.gates > 1 or not spec.dense:
            self._set_gates(spec.gates)

    def _set_gates(self, gates: int) -> None:
        """Gives the weights of a new module another number of gates, and draws them."""
        for name, parameter in self._parameters.items():
            assert parameter is not None
            if name.startswith("weight_hr"):
                continue
            _, *columns = parameter.shape
            rows = gates * self.hidden_size
            self._parameters[name] = nn.Parameter(parameter.new_empty(rows, *columns))
        self._init_flat_weights()
        self.reset_parameters()

    def _weight_rows(self) -> int:
        """The rows of the parameters of a layer and direction."""
        is_coupled = self._cell_options is not None and self._cell_options.coupled_gates
        return (3 if is_coupled else BY_MODE[self.mode].gates) * self.hidden_size

    def _add_initial_state(self) -> None:
        """Registers the learned initial state: zeros, after the weights."""
        self._learns_initial_state = True
        directions = 2 if self.bidirectional else 1
        sizes = {"h_0": self.proj_size or self.hidden_size}
        if BY_MODE[self.mode].has_cell_state:
            sizes["c_0"] = self.hidden_size
        like: Any = self.weight_ih_l0
        for name, units in sizes.items():
            zeros = like.detach().new_zeros(self.num_layers * directions, 1, units)
            self.register_parameter(name, nn.Parameter(zeros))

    def _initial_state_names(self) -> list[str]:
        if not self._learns_initial_state:
            return []
        return ["h_0", "c_0"] if BY_MODE[self.mode].has_cell_state else ["h_0"]

    def reset_parameters(self) -> None:
        """Draws the weights as ``torch.nn`` does, and sets a learned initial state to zero."""
        super().reset_parameters()
        if self._cell_options is not None and self._cell_options.layer_norm:
            cell_options.reset_norm_parameters(self, BY_MODE[self.mode].has_cell_state)
        for name in self._initial_state_names():
            nn.init.zeros_(getattr(self, name))

    @property
    @torch.jit.unused
    def weight_dtype(self) -> torch.dtype | None:
        """The dtype in which the CPU may hold w_hh, or None for its own dtype.

        It can be changed at any time. docs/float16_weights.md describes when it takes effect and
        what it costs.
        """
        return self._weight_dtype

    @weight_dtype.setter
    def weight_dtype(self, weight_dtype: torch.dtype | None) -> None:
        if checks.check_weight_dtype(weight_dtype) is None:
            self.__dict__.pop("_weight_dtype", None)
        else:
            self._weight_dtype = weight_dtype

    @property
    @torch.jit.unused
    def recompute(self) -> int | str:
        """``"none"``, ``"full"`` or k: how backward gets the activations of the forward pass.

        With k, forward keeps the states before every k steps only, and backward computes the
        activations of k steps at a time again. "full" chooses k, about the square root of the
        number of steps. It can be changed at any time; docs/memory.md describes what it saves and
        costs.
        """
        return self._recompute

    @recompute.setter
    def recompute(self, recompute: int | str) -> None:
        if checks.check_recompute(recompute) == 0:
            self.__dict__.pop("_recompute", None)
        else:
            self._recompute = recompute if isinstance(recompute, str) else int(recompute)

    @property
    @torch.jit.unused
    def residual(self) -> bool:
        """Whether each layer but the first adds its input to its output."""
        return self._residual

    @property
    @torch.jit.unused
    def batch_first_states(self) -> bool:
        """Whether initial and final states are [B,L*D,*] instead of [L*D,B,*]."""
        return self._batch_first_states

    @property
    @torch.jit.unused
    def layer_norm(self) -> bool:
        """Whether the cell has layer normalisation; its parameters belong to the constructor."""
        return self._option("layer_norm")  # type: ignore[no-any-return]

    @property
    @torch.jit.unused
    def zoneout(self) -> float | tuple[float, float]:
        """The probability that a unit keeps its state; can be changed at any time.

        As in the constructor: one number, or for an LSTM also a pair of those of c and of h.
        """
        return self._option("zoneout")  # type: ignore[no-any-return]

    @zoneout.setter
    def zoneout(self, zoneout: float | tuple[float, float]) -> None:
        self._change_option("zoneout", zoneout)

    @property
    @torch.jit.unused
    def recurrent_dropout(self) -> float:
        """The probability that a unit of h is zero in W_hh h; can be changed at any time."""
        return self._option("recurrent_dropout")  # type: ignore[no-any-return]

    @recurrent_dropout.setter
    def recurrent_dropout(self, recurrent_dropout: float) -> None:
        self._change_option("recurrent_dropout", recurrent_dropout)

    @property
    @torch.jit.unused
    def weight_dropout(self) -> float:
        """The probability that a value of W_hh is zero; can be changed at any time."""
        return self._option("weight_dropout")  # type: ignore[no-any-return]

    @weight_dropout.setter
    def weight_dropout(self, weight_dropout: float) -> None:
        self._change_option("weight_dropout", weight_dropout)

    @torch.jit.unused
    def _option(self, name: str) -> Any:
        return (self._cell_options or ModuleOptions()).arguments()[name]

    @torch.jit.unused
    def _change_option(self, name: str, value: Any) -> None:
        arguments = (self._cell_options or ModuleOptions()).arguments() | {name: value}
        arguments["hidden_size"] = self.hidden_size
        options = cell_options.parse(type(self).__name__, plain_spec(self.mode), **arguments)
        if options is not None:
            cell_options.check_together(self, options, self._recompute)
        self.unprepare()  # its kernels have no options
        if options is None:
            self.__dict__.pop("_cell_options", None)
        else:
            self._cell_options = options

    def __prepare_scriptable__(self) -> nn.Module:
        """Returns the module that ``torch.jit.script`` compiles.

        This is the module itself, or a view if its class inherits fastrnn's ``forward``: the
        compiler finds the overloads of ``forward`` only by the name of the class and the lines of
        its source. The view is an instance of a class with fastrnn's name. It shares all attributes
        with the module, replaces it in the Python model, and is pickled and copied as the module.
        """
        self._update_flat_weights()  # the compiler reads them
        check_scriptable(self, [*self._flat_weights_names, *self._initial_state_names()])
        if self._batch_first_states:
            raise RuntimeError(
                "torch.jit.script: batch_first_states must be False, got True. Use torch.export, "
                "torch.compile or torch.jit.trace."
            )
        if self._cell_options is not None:
            raise RuntimeError(
                "torch.jit.script: the layer must have no cell options, got "
                f"{self._cell_options.describe()}. Use torch.export, torch.compile or "
                "torch.jit.trace."
            )
        cls = type(self)
        own = next(c for c in cls.__mro__ if "forward" in c.__dict__)
        if own is cls or not own.__module__.startswith("fastrnn."):
            return self

        def reduce(view: RecurrentBase, protocol: int) -> tuple[Any, ...]:
            return object.__new__, (cls,), view.__getstate__()

        names = {"__module__": own.__module__, "__qualname__": own.__qualname__}
        overrides = {"__reduce_ex__": reduce, "_get_name": lambda view: cls.__name__}
        view_class = type(own.__name__, (cls,), {**names, **overrides})
        view: RecurrentBase = object.__new__(view_class)
        object.__setattr__(view, "__dict__", self.__dict__)
        return view

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "qconfig":
            warn_if_left_float(self, value)
        super().__setattr__(name, value)

    def extra_repr(self) -> str:
        """Returns the constructor's arguments as torch shows them, and those of fastrnn if set."""
        text = super().extra_repr()
        if self._weight_dtype is not None:
            text += f", weight_dtype={self._weight_dtype}"
        if self._learns_initial_state:
            text += ", learn_initial_state=True"
        if self._recompute != "none":
            text += f", recompute={self._recompute!r}"
        if self._residual:
            text += ", residual=True"
        if self._batch_first_states:
            text += ", batch_first_states=True"
        options = "" if self._cell_options is None else self._cell_options.as_arguments()
        if options:
            text += f", {options}"
        return text

    def prepare(self: _Module) -> _Module:
        """Packs a copy of the weights for inference on the CPU, and returns the module.

        Calls that need no gradient use this copy, so they neither pack the weights nor read
        unpacked ones: this is faster for short sequences and small batches. All other calls run as
        before. `fastrnn.explain` reports which weights a call uses.

        Changes of the weights in place, such as a step of an optimizer, do not change the copy:
        call `prepare` again. ``train()``, ``load_state_dict`` and ``to``, ``half``, ``cuda`` and
        the like drop it, and so does `unprepare`. Copies and pickles of the module, compiled and
        exported code do not have it. docs/session.md describes the speed.

        Raises:
            RuntimeError: the module is in training mode, or a weight is not a Parameter in float32
                or float64 on the CPU, or the cell has parameters per unit or over two states.
        """
        owner = f"{type(self).__name__}.prepare"
        self._check_packable("prepare")
        cell_options.reject(owner, self)
        cell_options.reject_other_weights(owner, self)
        if self.training:
            raise RuntimeError(
                f"{owner}: the module must be in eval mode, got training mode. Call eval() first."
            )
        self.unprepare()
        weights = self._weights()
        own = set(map(id, self._parameters.values()))
        if any(id(weight) not in own for weight in weights.flat):
            raise RuntimeError(
                f"{owner}: all weights must be Parameters, got one that is computed or None."
            )
        directions = 2 if self.bidirectional else 1
        shape = StackShape(
            self.num_layers,
            directions,
            self.input_size,
            self.hidden_size,
            self.proj_size,
            self._residual,
        )
        self._prepared = PreparedWeights(owner, BY_MODE[self.mode], shape, weights)
        return self

    def unprepare(self: _Module) -> _Module:
        """Drops the copy of the weights that `prepare` has packed, and returns the module."""
        self.__dict__.pop("_prepared", None)
        return self

    def stream(self, batch_size: int = 1, threads: int = 1) -> Session:
        """Returns a session that runs sequences step by step, with a packed copy of the weights.

            session = layer.stream()
            y = session.step(x)             # x [1,I], y [1,R]

        For inference, of layers with one direction. `fastrnn.Session` and docs/session.md describe
        its use, speed and errors. On CUDA a step is a CUDA graph.

        Args:
            batch_size: B, number of sequences that run at the same time. Default: 1
            threads: largest number of threads per call; 1 on CUDA. Default: 1

        Raises:
            RuntimeError: the cell has parameters per unit or over two states.
        """
        weight = next(self.parameters(), None)
        kind = CudaSession if weight is not None and weight.is_cuda else Session
        return kind(self, batch_size, threads)

    def _check_packable(self, method: str) -> None:
        """Raises unless weights of the cell can be packed once for many calls."""
        spec = BY_MODE[self.mode]
        if spec.parameters or spec.states > 2:
            raise RuntimeError(
                f"{type(self).__name__}.{method}: the cell must have no parameters per unit and at "
                f"most 2 states, got {spec.parameters} and {spec.states}."
            )

    def train(self: _Module, mode: bool = True) -> _Module:
        """Sets training or eval mode. Training mode drops the copy of `prepare`."""
        if mode:
            self.unprepare()
        return super().train(mode)

    def _apply(self: _Module, *args: Any, **kwargs: Any) -> _Module:
        self.unprepare()
        super()._apply(*args, **kwargs)  # type: ignore[no-untyped-call]
        return self

    def __getstate__(self) -> dict[str, Any]:
        state: dict[str, Any] = super().__getstate__()  # type: ignore[no-untyped-call]
        state.pop("_prepared", None)
        return state

    def flatten_parameters(self) -> None:
        """Does nothing: the kernels read the parameters where they are."""

    def _current_weights(self) -> list[Tensor | None]:
        """Returns the weights that `_flat_weights` should hold. Reads each one only once.

        A parametrization computes its weight on every access. Some also draw random numbers or
        update their own state (spectral norm).
        """
        # Reading the dictionary directly is faster than nn.Module.__getattr__.
        parameters = self._parameters
        weights: list[Any] = [parameters.get(name) for name in self._flat_weights_names]
        for index, weight in enumerate(weights):
            if weight is None:
                weights[index] = getattr(self, self._flat_weights_names[index], None)
        return weights

    def _differ_from_stored(self, weights: list[Tensor | None]) -> bool:
        for ref, weight in zip(self._flat_weight_refs, weights, strict=True):
            if weight is not None and ref is not None and ref() is not weight:
                return True
        return False

    def _weights_have_changed(self) -> bool:
        return self._differ_from_stored(self._current_weights())

    def _update_flat_weights(self) -> None:
        weights = self._current_weights()
        if self._differ_from_stored(weights):
            self._flat_weights = weights
            self._store_weak_references()

    def _weights(self, read: Weights | None = None) -> Weights:
        """Returns the weights to compute with; weight dropout draws its masks here.

        Args:
            read: those of `_torch_weights`, if they were read before.
        """
        weights = self._torch_weights() if read is None else read
        options = self._cell_options
        if options is None:
            return weights
        has_cell_state = BY_MODE[self.mode].has_cell_state
        return cell_options.with_options(self, options, has_cell_state, weights)

    def _weights_to_pack(self) -> Weights:
        """Returns the weights that a session packs: those of inference."""
        weights, options = self._torch_weights(), self._cell_options
        if options is None or not options.coupled_gates:
            return weights
        options = options._replace(weight_dropout=0.0)
        return cell_options.with_options(self, options, True, weights)

    def _torch_weights(self) -> Weights:
        """Returns the weights of ``torch.nn``.

        Compiled code reads the parameters on every call. Using `_flat_weights` there would guard on
        weak references and store traced tensors in the module.
        """
        if torch.compiler.is_compiling():
            weights = self._current_weights()
        else:
            self._update_flat_weights()
            weights = self._flat_weights
        slots = slots_of_names(self._flat_weights_names)
        if NoneType in map(type, weights):
            return self._without_none(weights, slots)
        return Weights(weights, slots)  # type: ignore[arg-type]

    def _without_none(self, weights: list[Tensor | None], slots: int) -> Weights:
        """Replaces biases that are None by zeros, or drops all biases if all are None."""
        names = self._flat_weights_names
        is_bias = [name.startswith("bias") for name in names]
        for name, bias, weight in zip(names, is_bias, weights, strict=True):
            if weight is None and not bias:
                raise RuntimeError(f"{type(self).__name__}: {name} must be a tensor, got None.")
        if all(weight is None for bias, weight in zip(is_bias, weights, strict=True) if bias):
            return Weights([weight for weight in weights if weight is not None], slots & ~BIASES)
        # a bias has one value per row of w_ih of its layer and direction
        rows = {n: w.shape[0] for n, w in zip(names, weights, strict=True) if w is not None}
        first: Any = weights[0]
        flat = [
            first.new_zeros(rows["weight_ih" + name[len("bias_ih") :]])
            if weight is None
            else weight
            for name, weight in zip(names, weights, strict=True)
        ]
        return Weights(flat, slots)

    def _store_weak_references(self) -> None:
        weights: list[Any] = self._flat_weights
        self._flat_weight_refs = [None if w is None else weakref.ref(w) for w in weights]

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        # With torch.__future__.set_swap_module_params_on_conversion, torch cannot swap tensors that
        # have weak references.
        self.unprepare()
        self._flat_weight_refs = []
        try:
            super()._load_from_state_dict(*args, **kwargs)
        finally:
            self._store_weak_references()

    def _initial_states(self, input: Tensor, batch: int) -> Hidden:
        """Returns the states of a call without ``hx``: the learned ones, or zeros."""
        if self._learns_initial_state:
            return self._learned_states(batch)
        return self._zero_states(input, batch)

    def _learned_states(self, batch: int) -> Hidden:
        states = [getattr(self, name).expand(-1, batch, -1) for name in self._initial_state_names()]
        return tuple(states) if len(states) > 1 else states[0]

    def _zero_states(self, input: Tensor, batch: int) -> Hidden:
        states = self.num_layers * (2 if self.bidirectional else 1)
        return input.new_zeros(states, batch, self.hidden_size)

    def _add_batch(self, hx: Hidden, is_batched: bool) -> Hidden:
        """Checks that the states have the input's kind of dimensions; returns them as 3-D."""
        if is_batched:
            if hx.dim() != 3:
                raise RuntimeError(
                    f"For batched 3-D input, hx should also be 3-D but got {hx.dim()}-D tensor"
                )
            return hx
        if hx.dim() != 2:
            raise RuntimeError(
                f"For unbatched 2-D input, hx should also be 2-D but got {hx.dim()}-D tensor"
            )
        return hx.unsqueeze(1)

    def _compute(
        self,
        input: Tensor,
        hx: Hidden,
        sequence: SequenceTensors,
        weights: Weights,
        marks: Marks = NO_MARKS,
        recorder: Recorder | None = None,
    ) -> tuple[Tensor, Hidden]:
        spec = BY_MODE[self.mode]
        h0, c0 = self._states(hx) if spec.has_cell_state else (hx, None)
        options = DEFAULTS
        prepared = None if torch.compiler.is_compiling() else self._prepared
        if (
            self.num_layers > 1
            or self._weight_dtype is not None
            or prepared is not None
            or self._recompute != "none"
        ):
            options = Options(
                self.num_layers,
                # not read unless needed: Dynamo would make a float an input of compiled code
                self.dropout if self.num_layers > 1 and self.training else 0.0,
                WEIGHT_FORMATS[self._weight_dtype],
                prepared,
                recompute=checks.check_recompute(self._recompute),
                residual=self._residual,
            )
        if recorder is not None:
            options = options._replace(recorder=recorder)
        if self._cell_options is not None:
            cell_options.check_together(self, self._cell_options, self._recompute)
            options = options._replace(
                cell=self._cell_options.of_call(self.training), heads=self._cell_options.heads
            )
            if options == DEFAULTS:
                options = DEFAULTS  # `run` compares by identity
        call = LayerCall(spec, input, sequence, h0, c0, weights, options)
        swapped = self.batch_first and sequence.named().batch_sizes is None
        if marks is NO_MARKS:
            output, h_n, c_n = run(call, swapped)
        else:
            output, h_n, c_n = run_marked(call, marks, swapped)
        return output, h_n if c0 is None else (h_n, c_n)

    def _states(self, hx: Hidden) -> tuple[Tensor, Tensor | None]:
        """Returns h and c, or h and None if the cell has no cell state."""
        return hx, None

    def _run_fast_path(
        self, input: Tensor, hx: Hidden, marks: Marks = NO_MARKS
    ) -> tuple[Tensor, Hidden] | None:
        """Fast path: runs one layer, or prepared layers, by the kernels. None if it does not apply.

        The general path takes longer than the kernel of a small layer. Here only the operator
        checks the arguments. If it rejects them, `_run` tries the general path, which supports them
        or raises an error in torch's words.
        """
        if not choose.may_use_fast_path():  # first, so that compiled code guards on nothing else
            return None
        if self._prepared is not None and marks is NO_MARKS:
            results = self._run_prepared(self._prepared, input, hx)
            if results is not None:
                return results
        weights, parameters = self._flat_weights, self._parameters
        if not (
            type(input) is Tensor
            and self.num_layers == 1
            and self._weight_dtype is None
            and self._cell_options is None
            and not self._overrides_checks
            and input.dim() == 3
            and not input.is_meta  # the operator checks no sizes of meta tensors
            # nearly always in this order; looking up each name takes longer
            and (
                (len(parameters) == len(weights) and all(map(is_, parameters.values(), weights)))
                or all(map(is_, map(parameters.get, self._flat_weights_names), weights))
            )
        ):
            return None
        batch_first = self.batch_first
        if batch_first:
            input = input.transpose(0, 1)
        steps, batch, _ = input.shape
        spec = BY_MODE[self.mode]
        if steps < 2 and (
            steps == 0
            or (input.dtype in HALF and torch_step.is_faster_in_half(spec, batch, weights))
        ):
            return None
        if hx is not None:
            h0, c0 = self._states(hx)
        elif spec.has_cell_state or self._learns_initial_state:
            h0, c0 = self._states(self._initial_states(input, batch))
        else:
            directions = 2 if self.bidirectional else 1
            h0, c0 = input.new_zeros(directions, batch, self.hidden_size), None
        # If these attributes no longer fit the weights, the operator raises.
        slots = MATRICES | BIASES if self.bias else MATRICES
        if self.proj_size:
            slots |= PROJECTION
        if marks is not NO_MARKS:
            ragged = as_ragged(marks, spec, batch_first)
            if (
                ragged is None
                or not input.is_cpu
                or self._learns_initial_state
                or self._recompute != "none"
                or NoneType in map(type, weights)
            ):
                return None
            named = Weights(weights, slots)  # type: ignore[arg-type]
            y, h_n, c_n = ragged_layer(LayerCall(spec, input, PADDED, h0, c0, named), ragged)
        elif torch.is_grad_enabled():
            if (
                self._recompute != "none"
                or NoneType in map(type, weights)
                or type(h0) is not Tensor
                or not (c0 is None or type(c0) is Tensor)
            ):
                return None
            named = Weights(weights, slots)  # type: ignore[arg-type]
            y, h_n, c_n = kernel_layer(LayerCall(spec, input, PADDED, h0, c0, named))
        else:
            y, h_n, c_n, _ = forward_op(
                input, h0, c0, weights, slots, None, spec.name, spec.inference_outputs
            )
        return y.transpose(0, 1) if batch_first else y, h_n if c0 is None else (h_n, c_n)

    def _run_prepared(
        self, prepared: PreparedWeights, input: Tensor, hx: Hidden
    ) -> tuple[Tensor, Hidden] | None:
        """Runs all layers with prepared weights. None if they do not serve the call."""
        if type(input) is not Tensor or input.dim() != 3 or self._overrides_checks:
            return None
        x = input.transpose(0, 1) if self.batch_first else input
        batch = x.shape[1]
        spec = BY_MODE[self.mode]
        if hx is None:
            hx = self._initial_states(x, batch)
        elif spec.has_cell_state and not (isinstance(hx, (tuple, list)) and len(hx) == 2):
            return None  # as below, the general path raises an error
        h0, c0 = self._states(hx)
        count = self.num_layers * (2 if self.bidirectional else 1)
        expected = [(h0, self.proj_size or self.hidden_size)]
        if spec.has_cell_state:
            expected.append((c0, self.hidden_size))  # type: ignore[arg-type]
        if x.shape[2] != self.input_size or not all(
            type(state) is Tensor
            and state.shape == (count, batch, size)
            and state.dtype is x.dtype
            and state.is_cpu
            for state, size in expected
        ):
            return None
        dropout = self.dropout if self.training else 0.0
        options = Options(self.num_layers, dropout, WEIGHT_FORMATS[self._weight_dtype], prepared)
        # learned initial states come after the weights
        weights: Any = list(self._parameters.values())[: len(self._flat_weights_names)]
        call = LayerCall(spec, x, PADDED, h0, c0, Weights(weights, 0), options)
        if prepared_backend.unsupported(call):
            return None
        y, h_n, c_n = prepared_backend.run(call)
        return y.transpose(0, 1) if self.batch_first else y, h_n if c0 is None else (h_n, c_n)

    def _run(
        self,
        input: Tensor | PackedSequence,
        hx: Hidden,
        lengths: Tensor | None,
        resets: Tensor | None,
        reset_state: Hidden,
        return_all_states: bool,
        return_gates: bool,
        is_layers_first: bool = False,
    ) -> tuple[Tensor | PackedSequence, Hidden]:
        if self._batch_first_states and not is_layers_first:
            return self._run_batch_first_states(  # type: ignore[no-any-return]
                input, hx, Marks(lengths, resets, reset_state), return_all_states, return_gates
            )
        rejection = None
        marks = NO_MARKS
        try:
            if return_all_states is not False or return_gates is not False:
                marks = Marks(lengths, resets, reset_state)
                returned = untraced(return_all_states), untraced(return_gates)
                if returned[0] is False and returned[1] is False:
                    return self._run(input, hx, *marks, *returned, is_layers_first)
                return self._run_recorded(  # type: ignore[return-value]
                    input, hx, marks, *returned
                )
            if lengths is not None or resets is not None or reset_state is not None:
                marks = Marks(lengths, resets, reset_state)
            try:
                quick = self._run_fast_path(input, hx, marks)  # type: ignore[arg-type]
                if quick is not None:
                    return quick
            except Exception as error:
                raise_unless_rejected(error)
                rejection = error
            options = None if marks is NO_MARKS else marks._asdict()
            node = leaf_call(self, input, hx, options)
            if node is not None:
                return node  # type: ignore[no-any-return]
            return self._run_general_path(input, hx, marks)
        except Exception as error:
            if rejection is not None:
                error.__cause__ = rejection
            checks.explain_layer(self, input, hx)
            raise

    def _run_batch_first_states(
        self,
        input: Tensor | PackedSequence,
        hx: Hidden,
        marks: Marks,
        return_all_states: bool,
        return_gates: bool,
    ) -> Any:
        """Runs a call whose states are [B,L*D,*]."""
        options = {
            **marks._asdict(),
            "return_all_states": return_all_states or None,
            "return_gates": return_gates or None,
        }
        node = leaf_call(self, input, hx, options)
        if node is not None:
            return node
        is_packed = isinstance(input, PackedSequence)
        x: Any = input
        is_batched = is_packed or (isinstance(x, Tensor) and x.dim() == 3)
        if is_batched:
            batch = None
            if not (is_packed or x.is_nested):
                batch = size(x, 0 if self.batch_first else 1)
            count = self.num_layers * (2 if self.bidirectional else 1)
            units = [self.proj_size or self.hidden_size]
            if BY_MODE[self.mode].has_cell_state:
                units.append(self.hidden_size)
            expected = [(batch, count, own) for own in units]
            hx = layers_first("hx", hx, expected)
            reset_state = layers_first("reset_state", marks.reset_state, expected)
            marks = marks._replace(reset_state=reset_state)
        results: Any = self._run(input, hx, *marks, return_all_states, return_gates, True)
        if not is_batched:
            return results
        output, hidden, *extras = results
        return (output, batch_first(hidden), *extras)

    def _run_recorded(
        self,
        input: Tensor | PackedSequence,
        hx: Hidden,
        marks: Marks,
        return_all_states: bool,
        return_gates: bool,
    ) -> tuple[Tensor | PackedSequence, Hidden, Extras]:
        """Runs a call that also returns states or gates of every step."""
        if all(mark is None for mark in marks):
            marks = NO_MARKS
        recorder = recorder_of(return_all_states, return_gates)
        owner = f"{type(self).__name__}: with return_all_states or return_gates"
        cell_options.reject(owner, self, self.training)
        if return_gates and BY_MODE[self.mode].parameters:
            raise ValueError(
                f"{type(self).__name__}: return_gates must be False with peephole=True, got True."
            )
        options = {
            **marks._asdict(),
            "return_all_states": return_all_states or None,
            "return_gates": return_gates or None,
        }
        node = leaf_call(self, input, hx, options)
        if node is not None:
            return node  # type: ignore[no-any-return]
        output, hidden = self._run_general_path(input, hx, marks, recorder)
        assert recorder is not None  # one option is true
        c_n = hidden[1] if BY_MODE[self.mode].has_cell_state else None
        if isinstance(output, PackedSequence):
            return output, hidden, recorder.extras(False, output.data, c_n)
        extras = recorder.extras(self.batch_first, output, c_n)
        if output.is_nested:
            return output, hidden, map_extras(extras, lambda t: self._nest(t, output))
        if output.dim() == 2:  # no batch dimension
            batch_dim = 0 if self.batch_first else 2
            extras = map_extras(extras, lambda t: t.squeeze(batch_dim))
        return output, hidden, extras

    def _run_general_path(
        self,
        input: Tensor | PackedSequence,
        hx: Hidden,
        marks: Marks = NO_MARKS,
        recorder: Recorder | None = None,
    ) -> tuple[Tensor | PackedSequence, Hidden]:
        """Runs any call. `_run` replaces unclear errors.

        The checks need the weights of ``torch.nn``; weight dropout draws a mask after the checks.
        """
        if isinstance(input, PackedSequence):
            marks.check_absent("a PackedSequence")
            return self._run_packed(input, hx, self._torch_weights(), recorder)
        if input.is_nested and input.layout is torch.jagged:
            marks.check_absent("a nested tensor")
            return self._run_nested(input, hx, recorder)
        weights = self._torch_weights()
        dim = input.dim()
        if dim not in (2, 3):
            raise ValueError(self._wrong_input_message.format(dim))
        is_batched = dim == 3
        if not is_batched:
            marks.check_absent("an input without a batch dimension")
        batch_dim = 0 if self.batch_first else 1
        if not is_batched:
            input = input.unsqueeze(batch_dim)
        if hx is None:
            hx = self._initial_states(input, input.shape[batch_dim])
        else:
            hx = self._add_batch(hx, is_batched)
        without_tracing(self.check_forward_args, input, hx, None)
        if self._learns_initial_state and marks.resets is not None and marks.reset_state is None:
            marks = marks._replace(reset_state=self._learned_states(1))
        weights = self._weights(weights)
        output, hidden = self._compute(input, hx, PADDED, weights, marks, recorder)
        if is_batched:
            return output, hidden
        output = output.squeeze(batch_dim)
        if isinstance(hidden, Tensor):
            return output, hidden.squeeze(1)
        return output, tuple([state.squeeze(1) for state in hidden])

    def _run_nested(
        self, input: Tensor, hx: Hidden, recorder: Recorder | None
    ) -> tuple[Tensor, Hidden]:
        """Runs a jagged tensor [B,jagged,I]; the output is jagged in the same way."""
        jagged: Any = input
        if jagged.dim() != 3 or jagged.lengths() is not None:
            raise ValueError(
                "input, if it is jagged, must be contiguous and have 3 dimensions, got "
                f"{jagged.dim()} dimensions{'' if jagged.lengths() is None else ' with gaps'}"
            )
        offsets = jagged.offsets()
        lengths = offsets.diff()
        x = jagged.to_padded_tensor(0.0)
        y: Any
        y, hidden = self._run_general_path(
            x if self.batch_first else x.transpose(0, 1), hx, Marks(lengths=lengths), recorder
        )
        return self._nest(y, input), hidden

    def _nest(self, padded: Tensor, like: Any) -> Tensor:
        """Returns the values of a padded batch as a jagged tensor like another.

        Args:
            padded: [T,B,*] or [T,*,B,*] with one dimension between; [B,T,*] with ``batch_first``.
            like: [B,jagged,*].
        """
        if not self.batch_first:
            padded = padded.transpose(0, 1) if padded.dim() == 3 else padded.permute(2, 0, 1, 3)
        offsets = like.offsets()
        steps = torch.arange(padded.shape[1], device=padded.device)
        values = padded[steps < offsets.diff().unsqueeze(1)]
        return torch.nested.nested_tensor_from_jagged(values, offsets)

    def _run_packed(
        self,
        packed: PackedSequence,
        hx: Hidden,
        weights: Weights,
        recorder: Recorder | None = None,
    ) -> tuple[PackedSequence, Hidden]:
        data, batch_sizes, sorted_indices, unsorted_indices = packed
        for indices in (sorted_indices, unsorted_indices):
            if indices is not None and indices.is_meta and not data.is_meta:
                # torch would return uninitialised memory
                raise RuntimeError(f"sorted_indices must be on {data.device}, got meta.")
        is_compiling = torch.compiler.is_compiling()
        if hx is None:
            if is_compiling and sorted_indices is not None:
                batch: Any = sorted_indices.shape[0]  # a shape, so no tensor value is read
            else:
                batch = batch_sizes[0]
                if not is_tracing():  # in a trace it stays a tensor: the graph computes it
                    batch = int(batch)
            hx = self._initial_states(data, batch)
        else:
            # the caller's states are in the order that the sequences had before sorting
            hx = self.permute_hidden(hx, sorted_indices)
        if is_compiling:
            self._check_packed_by_shapes(data, hx, batch_sizes)
        else:
            without_tracing(self.check_forward_args, data, hx, batch_sizes)
        sequence = SequenceMembers(batch_sizes).pack()
        weights = self._weights(weights)
        output, hidden = self._compute(data, hx, sequence, weights, NO_MARKS, recorder)
        result = PackedSequence(output, batch_sizes, sorted_indices, unsorted_indices)
        return result, self.permute_hidden(hidden, unsorted_indices)

    def _check_packed_by_shapes(self, data: Tensor, hx: Hidden, batch_sizes: Tensor) -> None:
        """Runs `check_forward_args` without the values of batch_sizes, unknown to a compiler.

        Compares the states with a padded input of the states' own batch size. The operator checks
        on each call that batch_sizes has the same batch size.
        """
        self.check_input(data, batch_sizes)
        h = hx if isinstance(hx, Tensor) else hx[0]
        padded = data.unsqueeze(1).expand(-1, h.shape[1] if h.dim() > 1 else 1, -1)
        self.check_forward_args(padded.transpose(0, 1) if self.batch_first else padded, hx, None)

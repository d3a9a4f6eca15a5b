"""Training by truncated backpropagation through time.

    state_0 = 0;  for each chunk k:  loss_k, state_{k+1} = tbptt(model, chunk_k, state_k)

The hidden state continues from chunk to chunk. Gradients stop at the first step of a chunk. At the
end of the streams the text starts again, with a state of zeros. A step trains on one chunk, so that
training can stop, evaluate and save between any two chunks.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any, Final, Protocol

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from fastrnn.tbptt import tbptt

from . import schedule
from .config import Config
from .data import Corpus, Streams
from .errors import CheckpointError, TrainingError
from .model import CharRNN, State, build_model

NATS_TO_BITS: Final = 1 / math.log(2)
RECENT_STEPS: Final = 50  # the loss shown during training is the mean over this many steps

Stop = Callable[[], bool]


@dataclass(frozen=True)
class Evaluation:
    """Losses at a step, in bits per character."""

    step: int
    training: float  # mean since the last evaluation
    validation: float
    learning_rate: float
    seconds: float  # training time so far

    def to_json(self) -> dict[str, Any]:
        """Returns the evaluation as plain data."""
        return asdict(self)


class Runner(Protocol):
    """A training that `fit` can run: one `Trainer`, or two side by side."""

    @property
    def main(self) -> Trainer:
        """The trainer that generates samples and is saved."""

    def run(self, steps: int, stop: Stop) -> None:
        """Trains for ``steps`` steps, or until ``stop()`` is true."""

    def evaluate(self) -> str:
        """Measures the validation loss and returns it as one line of text."""

    def status(self) -> str:
        """Returns loss and speed of the last steps as one line of text."""


def never_stop() -> bool:
    """Returns false: the default ``stop`` function."""
    return False


class Trainer:
    """A model in training: weights, optimizer, hidden state, random numbers and losses.

    Args:
        config: the options.
        corpus: the text to train on.
        model: the model to train; default: a new one from the configured seed.
    """

    def __init__(self, config: Config, corpus: Corpus, model: CharRNN | None = None) -> None:
        self.config = config
        self.corpus = corpus
        self.model = build_model(len(corpus.vocabulary), config) if model is None else model
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=config.learning_rate)
        self.state: State = self.model.zero_state(corpus.training.batch_size)
        self.losses: list[float] = []  # nats per character, one per step
        self.evaluations: list[Evaluation] = []
        self.seconds = 0.0  # time of the training steps alone
        self._cuda = torch.device(config.device).type == "cuda"
        self._random: list[Tensor] = self._initial_random_states()
        self._recent: deque[tuple[int, float]] = deque(maxlen=20)  # (steps, seconds) of runs

    @property
    def main(self) -> Trainer:
        """This trainer."""
        return self

    @property
    def step(self) -> int:
        """Number of completed steps."""
        return len(self.losses)

    @property
    def validation_losses(self) -> list[float]:
        """Bits per character of the held-out text, one per evaluation."""
        return [evaluation.validation for evaluation in self.evaluations]

    @property
    def characters_per_second(self) -> float:
        """Training speed of the last runs."""
        seconds = sum(seconds for _, seconds in self._recent)
        steps = sum(steps for steps, _ in self._recent)
        return steps * self.config.characters_per_step / seconds if seconds else 0.0

    def run(self, steps: int, stop: Stop = never_stop) -> None:
        """Trains for ``steps`` steps, or until ``stop()`` is true.

        The grouping of steps into runs affects only the timing.

        Raises:
            TrainingError: the loss is NaN or infinite. The weights are unusable then.
        """
        started = time.perf_counter()
        losses: list[Tensor] = []
        self.model.train()
        with self._trainer_random_numbers():
            for step in range(self.step, self.step + steps):
                losses.append(self._train_step(step))
                if stop():
                    break
            # Reading a loss waits for the GPU, so read all losses at the end.
            values = torch.stack(losses).tolist() if losses else []
        seconds = time.perf_counter() - started
        for value in values:
            if not math.isfinite(value):
                raise TrainingError(
                    f"the loss became {value} at step {self.step + 1}: "
                    "try a smaller --lr, a smaller --clip or another --seed"
                )
            self.losses.append(value)
        self.seconds += seconds
        self._recent.append((len(values), seconds))

    def _train_step(self, step: int) -> Tensor:
        training = self.corpus.training
        index = step % training.chunks
        if index == 0:
            self.state = self.model.zero_state(training.batch_size)
        for group in self.optimizer.param_groups:
            group["lr"] = schedule.learning_rate(self.config, step, self.validation_losses)
        x, y = training.chunk(index)
        self.optimizer.zero_grad()
        loss, self.state = tbptt(self.model, x, y, mean_loss, training.seq_length, self.state)
        if self.config.clip > 0:
            nn.utils.clip_grad_norm_(self.model.parameters(), self.config.clip)
        self.optimizer.step()
        return loss

    def evaluate(self) -> str:
        """Measures and records the validation loss, and returns it as one line of text."""
        since = self.evaluations[-1].step if self.evaluations else 0
        recent = self.losses[since:]
        evaluation = Evaluation(
            step=self.step,
            training=sum(recent) / max(1, len(recent)) * NATS_TO_BITS,
            validation=evaluate(self.model, self.corpus.validation) * NATS_TO_BITS,
            learning_rate=float(self.optimizer.param_groups[0]["lr"]),
            seconds=self.seconds,
        )
        if not math.isfinite(evaluation.validation):
            raise TrainingError(
                f"the validation loss became {evaluation.validation} at step {self.step}: "
                "try a smaller --lr, a smaller --clip or another --seed"
            )
        self.evaluations.append(evaluation)
        return (
            f"training {evaluation.training:.3f}, validation {evaluation.validation:.3f} bits/char"
            f", {self.characters_per_second:,.0f} chars/s"
        )

    def status(self) -> str:
        """Returns loss and speed of the last steps as one line of text."""
        return f"{self.recent_bits():.3f} bits/char, {self.characters_per_second:,.0f} chars/s"

    def recent_bits(self) -> float:
        """Returns the mean training loss of the last steps, in bits per character."""
        recent = self.losses[-RECENT_STEPS:]
        return sum(recent) / max(1, len(recent)) * NATS_TO_BITS

    # -- checkpoints ---------------------------------------------------------------------------

    def tensors(self) -> dict[str, Tensor]:
        """Returns by name all tensors that the next step depends on."""
        named: dict[str, Tensor] = {
            f"model.{name}": value for name, value in self.model.state_dict().items()
        }
        for name, parameter in self.model.named_parameters():
            for key, value in self.optimizer.state.get(parameter, {}).items():
                named[f"optimizer.{name}.{key}"] = value
        states = self.state if isinstance(self.state, tuple) else (self.state,)
        named |= {f"state.{index}": value for index, value in enumerate(states)}
        named |= {f"random.{index}": value for index, value in enumerate(self._random)}
        named["losses"] = torch.tensor(self.losses, dtype=torch.float64)
        return {
            name: value.detach().cpu().clone(memory_format=torch.contiguous_format)
            for name, value in named.items()
        }

    def restore(
        self, tensors: Mapping[str, Tensor], evaluations: list[Evaluation], seconds: float
    ) -> None:
        """Restores the tensors that `tensors` returned.

        Raises:
            CheckpointError: names, shapes or types differ from those of this trainer.
        """
        losses = tensors.get("losses")
        if losses is None or losses.dim() != 1 or losses.dtype != torch.float64:
            raise CheckpointError("'losses' is missing or has the wrong shape")
        expected = self._expected(trained=losses.numel() > 0)
        for name, like in expected.items():
            tensor = tensors.get(name)
            if tensor is None or tensor.shape != like.shape or tensor.dtype != like.dtype:
                raise CheckpointError(f"{name!r} is missing or has the wrong shape or type")
        load_weights(self.model, tensors)
        device = self.config.device
        state: dict[int, dict[str, Tensor]] = {}
        for index, (name, _) in enumerate(self.model.named_parameters()):
            prefix = f"optimizer.{name}."
            found = {
                key.removeprefix(prefix): tensors[key] for key in expected if key.startswith(prefix)
            }
            if found:
                state[index] = found
        groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({"state": state, "param_groups": groups})
        h = tensors["state.0"].to(device)
        self.state = (h, tensors["state.1"].to(device)) if "state.1" in expected else h
        self._random = [
            tensors.get(f"random.{index}", fresh)
            for index, fresh in enumerate(self._initial_random_states())
        ]
        try:
            with self._trainer_random_numbers():
                pass
        except (RuntimeError, TypeError) as error:
            raise CheckpointError("'random' is not a state of torch's generator") from error
        self.losses = tensors["losses"].tolist()
        self.evaluations = list(evaluations)
        self.seconds = seconds

    def _expected(self, trained: bool) -> dict[str, Tensor]:
        """Returns by name tensors of the expected shapes and types, except the losses."""
        expected: dict[str, Tensor] = {
            f"model.{name}": value for name, value in self.model.state_dict().items()
        }
        if trained:
            for name, parameter in self.model.named_parameters():
                expected[f"optimizer.{name}.step"] = torch.tensor(0.0, dtype=torch.float32)
                expected[f"optimizer.{name}.exp_avg"] = parameter
                expected[f"optimizer.{name}.exp_avg_sq"] = parameter
        states = self.state if isinstance(self.state, tuple) else (self.state,)
        expected |= {f"state.{index}": value for index, value in enumerate(states)}
        return expected | {"random.0": self._random[0]}

    # -- random numbers of this trainer --------------------------------------------------------

    def _initial_random_states(self) -> list[Tensor]:
        """Returns generator states for the seed: of the CPU and, if used, of the GPU."""
        with self._rng_preserved():
            torch.default_generator.manual_seed(self.config.seed)
            states = [torch.get_rng_state()]
            if self._cuda:
                torch.cuda.manual_seed(self.config.seed)
                states.append(torch.cuda.get_rng_state(self.config.device))
            return states

    @contextmanager
    def _trainer_random_numbers(self) -> Iterator[None]:
        """Makes dropout draw from the random numbers of this trainer, not from the global ones."""
        with self._rng_preserved():
            torch.set_rng_state(self._random[0])
            if self._cuda:
                torch.cuda.set_rng_state(self._random[1], self.config.device)
            yield
            self._random[0] = torch.get_rng_state()
            if self._cuda:
                self._random[1] = torch.cuda.get_rng_state(self.config.device)

    @contextmanager
    def _rng_preserved(self) -> Iterator[None]:
        devices = [torch.device(self.config.device).index or 0] if self._cuda else []
        with torch.random.fork_rng(devices=devices):
            yield


def mean_loss(logits: Tensor, y: Tensor) -> Tensor:
    """Returns the mean loss of logits [T,B,V] for the characters y [T,B], in nats."""
    return cross_entropy(logits.flatten(0, 1), y.flatten())


def load_weights(model: CharRNN, tensors: Mapping[str, Tensor]) -> None:
    """Loads the ``model.*`` tensors of a checkpoint into a model.

    Raises:
        CheckpointError: names or shapes differ from those of this model.
    """
    weights = {
        name.removeprefix("model."): value
        for name, value in tensors.items()
        if name.startswith("model.")
    }
    try:
        model.load_state_dict(weights, strict=True)
    except RuntimeError as error:
        raise CheckpointError("the weights do not fit the options saved with them") from error


@torch.no_grad()
def evaluate(model: CharRNN, streams: Streams) -> float:
    """Returns the mean loss over all chunks of the streams, in nats per character.

    The state continues from chunk to chunk. The mode of the model (training or evaluation) is
    restored at the end.
    """
    was_training = model.training
    model.eval()
    state = model.zero_state(streams.batch_size)
    total = torch.zeros((), dtype=torch.float64, device=model.decoder.weight.device)
    for index in range(streams.chunks):
        x, y = streams.chunk(index)
        logits, state = model(x, state)
        total += mean_loss(logits, y)
    model.train(was_training)
    return total.item() / streams.chunks

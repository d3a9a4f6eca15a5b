"""A small character model and text for the tests of the character model."""

from __future__ import annotations

import random

from fastrnn.tools.charlm.config import Config
from fastrnn.tools.charlm.data import Corpus, Text, prepare
from fastrnn.tools.charlm.train import Trainer

SMALL = Config(
    hidden=12, layers=2, seq_length=8, batch_size=4, steps=12, eval_every=5, sample_every=0
)


def some_text(characters: int = 1500) -> Text:
    """Returns a fixed random sequence of a few words."""
    draws = random.Random(5)
    words = ["def ", "return ", "self", ".x", "(y)", ":\n", "    ", "for ", "in ", "ä"]
    parts = [draws.choice(words) for _ in range(characters)]
    return Text("".join(parts)[:characters], "some text")


def corpus_for(config: Config, characters: int = 1500) -> Corpus:
    return prepare(some_text(characters), config.batch_size, config.seq_length)


def trainer_for(config: Config) -> Trainer:
    return Trainer(config, corpus_for(config))

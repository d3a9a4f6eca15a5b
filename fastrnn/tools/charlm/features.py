"""Simple features of a text, and which units of a layer follow them.

A feature has one value per character: what a reader knows after this character. A unit that is
large inside quotes and small outside has a correlation near 1 with the feature "inside quotes".
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import torch
from torch import Tensor

_OPENING: Final = "([{"
_CLOSING: Final = ")]}"
_PREFIXES: Final = frozenset({"", "b", "f", "r", "u", "br", "fr", "rb", "rf"})
_SHIFTS: Final = 8  # parts of the text by which `chance` shifts the features


def text_features(text: str) -> dict[str, Tensor]:
    """Returns the features that vary within a text, float32 [T] by name."""
    found = {name: torch.tensor(feature(text), dtype=torch.float32) for name, feature in _ALL}
    return {name: values for name, values in found.items() if values.min() < values.max()}


def correlations(features: Tensor, activations: Tensor) -> Tensor:
    """Returns Pearson's correlation of every feature with every unit, [F,H].

    Args:
        features: [F,T].
        activations: [T,H]. A unit that is constant has the correlation 0.
    """
    units = _standardised(activations.t())
    return _standardised(features) @ units.t()


def chance(features: Tensor, activations: Tensor) -> Tensor:
    """Returns for every feature the largest absolute correlation that is a coincidence, [F].

    The features are shifted along the text (its end continues at its beginning), by one to seven
    eighths of its length. A shifted feature varies like the feature itself, but no unit follows it.

    Args:
        features: [F,T].
        activations: [T,H].
    """
    units = _standardised(activations.t())
    length = features.shape[1]
    largest = torch.zeros(features.shape[0])
    for part in range(1, _SHIFTS):
        shifted = _standardised(features.roll(part * length // _SHIFTS, dims=1))
        largest = torch.maximum(largest, (shifted @ units.t()).abs().amax(1))
    return largest


def _standardised(rows: Tensor) -> Tensor:
    """Returns rows with mean 0 and norm 1; zeros for a row that is constant."""
    wide = rows.double()
    centred = wide - wide.mean(1, keepdim=True)
    norm = centred.norm(dim=1, keepdim=True)
    # below this, the rest is rounding of a constant
    is_constant = norm <= 1e-6 * wide.norm(dim=1, keepdim=True)
    return torch.where(is_constant, 0.0, centred / norm).float()


# -- the features ---------------------------------------------------------------------------------


def _quoted(quote: str) -> Callable[[str], list[int]]:
    """Returns the feature "inside this quote": 1 from the opening quote to before the closing one.

    A line break closes the quote. Triple quotes and escaped quotes count neither as opening nor as
    closing. A quote directly after a letter or digit opens nothing, because it is an apostrophe,
    unless the word is one of Python's prefixes of strings.
    """

    def feature(text: str) -> list[int]:
        values, is_inside, is_escaped, word = [], False, False, ""
        for character, triple in zip(text, _triple_marks(text), strict=True):
            if character == "\n":
                is_inside = False
            elif character == quote and not is_escaped and not triple:
                is_inside = not is_inside and word.lower() in _PREFIXES
            is_escaped = character == "\\" and not is_escaped
            word = word + character if _is_of_word(character) else ""
            values.append(int(is_inside))
        return values

    return feature


def _triple_marks(text: str) -> list[bool]:
    """Returns whether each character is part of a triple quote."""
    marks = [False] * len(text)
    for quote in ('"""', "'''"):
        start = text.find(quote)
        while start >= 0:
            marks[start : start + 3] = [True] * 3
            start = text.find(quote, start + 3)
    return marks


def _triple_quoted(text: str) -> list[int]:
    values, opened = [0] * len(text), ""
    position = 0
    while position < len(text):
        mark = text[position : position + 3]
        if mark in ('"""', "'''") and opened in ("", mark):
            opened = "" if opened else mark
            values[position : position + 3] = [1] * 3 if opened else [1, 1, 0]
            position += 3
        else:
            values[position] = int(bool(opened))
            position += 1
    return values


def _commented(text: str) -> list[int]:
    values, is_inside = [], False
    for character in text:
        is_inside = character != "\n" and (is_inside or character == "#")
        values.append(int(is_inside))
    return values


def _brackets(text: str) -> list[int]:
    values, depth = [], 0
    for character in text:
        depth = max(0, depth + (character in _OPENING) - (character in _CLOSING))
        values.append(depth)
    return values


def _line_position(text: str) -> list[int]:
    values, position = [], 0
    for character in text:
        position = 0 if character == "\n" else position + 1
        values.append(position)
    return values


def _word_position(text: str) -> list[int]:
    values, position = [], 0
    for character in text:
        position = position + 1 if _is_of_word(character) else 0
        values.append(position)
    return values


def _indentation(text: str) -> list[int]:
    values, width, is_start = [], 0, True
    for character in text:
        if character == "\n":
            width, is_start = 0, True
        elif is_start and character in " \t":
            width += 1
        else:
            is_start = False
        values.append(width)
    return values


def _in_indentation(text: str) -> list[int]:
    values, is_start = [], True
    for character in text:
        is_start = character == "\n" or (is_start and character in " \t")
        values.append(int(is_start))
    return values


def _is_of_word(character: str) -> bool:
    return character.isalnum() or character == "_"


def _each(test: Callable[[str], bool]) -> Callable[[str], list[int]]:
    return lambda text: [int(test(character)) for character in text]


_ALL: Final[tuple[tuple[str, Callable[[str], list[int]]], ...]] = (
    ("inside double quotes", _quoted('"')),
    ("inside single quotes", _quoted("'")),
    ("inside triple quotes", _triple_quoted),
    ("after # in the line", _commented),
    ("depth of brackets", _brackets),
    ("position in the line", _line_position),
    ("indentation of the line", _indentation),
    ("in the indentation", _in_indentation),
    ("position in the word", _word_position),
    ("end of a word", _each(lambda character: not _is_of_word(character))),
    ("white space", _each(str.isspace)),
    ("line break", _each(lambda character: character == "\n")),
    ("upper case", _each(str.isupper)),
    ("digit", _each(str.isdigit)),
    (
        "punctuation",
        _each(lambda character: not _is_of_word(character) and not character.isspace()),
    ),
)

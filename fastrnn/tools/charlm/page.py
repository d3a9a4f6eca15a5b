"""A page that shows what the units of a model do at every character of a text.

The page is one HTML file: `page.html` with the data in place of its marker. The data are JSON;
activations in it are int8 in base64, each unit scaled by its largest absolute value:

    value = limit[unit] * q / 127          q in -127..127, wrong by at most limit[unit] / 254
"""

from __future__ import annotations

import base64
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from .activations import CELL, HIDDEN, Activations
from .data import Vocabulary
from .features import chance, correlations, text_features

VALUES_LIMIT: Final = 4_000_000  # activations in a page by default; 5.3 MB in base64
PREDICTIONS: Final = 5  # likeliest next characters per character
STEPS: Final = 127  # of the quantised values on each side of 0
_MARKER: Final = "@DATA@"
_FRACTIONS: Final = {"i", "f", "o", "r", "z"}  # gates from 0 (closed) to 1 (open)


def build(
    about: Mapping[str, Any],
    text: str,
    vocabulary: Vocabulary,
    activations: Activations,
    units: int | None = None,
    is_sigmoid: bool = False,
) -> str:
    """Returns the page.

    Args:
        about: facts about the model and the text, for the head of the page.
        text: T characters, at least two.
        vocabulary: the characters of the model.
        activations: the values of the model for this text.
        units: units per layer in the page, those that follow a feature most clearly. By default as
            many as `VALUES_LIMIT` allows.
        is_sigmoid: whether the state h is between 0 and 1.
    """
    data = page_data(about, text, vocabulary, activations, units, is_sigmoid)
    # No character that has a meaning in HTML remains, so no text can end the element of the data.
    written = json.dumps(data, separators=(",", ":"), allow_nan=False)
    for character in "<>&":
        written = written.replace(character, f"\\u{ord(character):04x}")
    template = Path(__file__).with_name("page.html").read_text(encoding="utf-8")
    return template.replace(_MARKER, written)


def page_data(
    about: Mapping[str, Any],
    text: str,
    vocabulary: Vocabulary,
    activations: Activations,
    units: int | None = None,
    is_sigmoid: bool = False,
) -> dict[str, Any]:
    """Returns the data of the page, for JSON. The arguments are those of `build`."""
    features = text_features(text)
    rows = torch.stack(list(features.values())) if features else torch.zeros(0, len(text))
    limit, largest = _quantised(rows)
    kept = units or default_units(activations)
    return {
        "about": dict(about),
        "text": text,
        "symbols": [Vocabulary.UNKNOWN_SYMBOL, *vocabulary.characters],
        "predictions": _predictions(activations.log_probabilities),
        "surprise": _surprise(activations.log_probabilities, vocabulary.encode(text)),
        "features": {"names": list(features), "limits": largest, "values": _base64(limit)},
        "fractions": sorted(_FRACTIONS | ({HIDDEN} if is_sigmoid else set())),
        "layers": [_layer(layer, rows, kept) for layer in activations.layers],
    }


def default_units(activations: Activations) -> int:
    """Returns the number of units per layer that `VALUES_LIMIT` allows, at least 1."""
    values = sum(len(layer) * next(iter(layer.values())).shape[0] for layer in activations.layers)
    return max(1, VALUES_LIMIT // values)


def _layer(layer: Mapping[str, Tensor], features: Tensor, kept: int) -> dict[str, Any]:
    r = {name: correlations(features, values) for name, values in layer.items()}
    coincidence = {name: chance(features, values) for name, values in layer.items()}
    count = layer[HIDDEN].shape[1]
    clearness = torch.full((count,), -math.inf)
    for name in {HIDDEN, CELL} & r.keys() if len(features) else ():
        by_chance = coincidence[name].unsqueeze(1)
        # 0 at chance, 1 at a perfect correlation
        clear = (r[name].abs() - by_chance) / (1 - by_chance).clamp(min=0.01)
        clearness = torch.maximum(clearness, clear.amax(0))
    chosen = clearness.topk(min(kept, count)).indices.sort().values
    quantities = {}
    for name, values in layer.items():
        quantised, limits = _quantised(values.t()[chosen])
        quantities[name] = {
            "limits": limits,
            "values": _base64(quantised),  # [U,T]
            "r": _base64((r[name][:, chosen] * 100).round().to(torch.int8)),  # [F,U]
            "chance": [round(value, 2) for value in coincidence[name].tolist()],
        }
    return {"units": chosen.tolist(), "count": count, "quantities": quantities}


def _quantised(rows: Tensor) -> tuple[Tensor, list[float]]:
    """Returns int8 values [N,T] and the value of `STEPS` for each row."""
    limits = rows.abs().amax(1) if len(rows) else rows.new_zeros(0)
    scale = torch.where(limits > 0, limits, 1.0).unsqueeze(1)
    quantised = (rows.double() / scale * STEPS).round().to(torch.int8)
    return quantised, [float(f"{limit:.7g}") for limit in limits.tolist()]


def _base64(values: Tensor) -> str:
    return base64.b64encode(values.contiguous().numpy().tobytes()).decode("ascii")


def _predictions(log_probabilities: Tensor) -> list[list[int]]:
    """Returns for each character the likeliest next symbols, and then their permille."""
    count = min(PREDICTIONS, log_probabilities.shape[1])
    top = log_probabilities.topk(count, dim=1)
    permille = (top.values.exp() * 1000).round().long()
    return torch.cat([top.indices, permille], dim=1).tolist()


def _surprise(log_probabilities: Tensor, numbers: Tensor) -> list[float]:
    """Returns for each character but the first -log2 of its probability, in bits."""
    following = numbers[1:].long().unsqueeze(1)
    nats = -log_probabilities[:-1].gather(1, following).squeeze(1)
    return [round(bits, 2) for bits in (nats / math.log(2)).tolist()]

"""Weights of other libraries and formats as fastrnn layers, one module per origin.

`weights.py` reads arrays and builds the layers. No module imports the library that it reads, except
`onnx.py`, which needs the package onnx.
"""

from fastrnn.interchange.flashrnn import from_flashrnn
from fastrnn.interchange.haste import from_haste
from fastrnn.interchange.keras import from_keras, to_keras_weights
from fastrnn.interchange.onnx import from_onnx
from fastrnn.interchange.reverse import Reversed

__all__ = [
    "Reversed",
    "from_flashrnn",
    "from_haste",
    "from_keras",
    "from_onnx",
    "to_keras_weights",
]

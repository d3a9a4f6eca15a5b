"""fastrnn: fast drop-in replacements for ``torch.nn.RNN``, ``LSTM`` and ``GRU``.

>>> import torch, fastrnn
>>> rnn = fastrnn.LSTM(10, 20, num_layers=2)
>>> output, (h_n, c_n) = rnn(torch.randn(5, 3, 10))
>>> output.shape
torch.Size([5, 3, 20])
"""

from fastrnn import _C, functional
from fastrnn import flops as _flops  # noqa: F401 - registers the operators' formulas
from fastrnn.c_interface import get_include, get_library
from fastrnn.convert import ConversionReport, convert, patch, unpatch
from fastrnn.define import DefinedLayer, define_cell
from fastrnn.engine.states import Extras
from fastrnn.explanation import Explanation, explain
from fastrnn.interchange import (
    Reversed,
    from_flashrnn,
    from_haste,
    from_keras,
    from_onnx,
    to_keras_weights,
)
from fastrnn.modules import *
from fastrnn.modules import cells as _cells
from fastrnn.modules import linear_time as _linear_time
from fastrnn.modules import minimal_gated as _minimal_gated
from fastrnn.modules import more_cells as _more_cells
from fastrnn.modules import rnn as _rnn
from fastrnn.quantization import QuantizedRecurrent, quantization_mapping, quantize
from fastrnn.session import Session
from fastrnn.tbptt import TbpttProgress, tbptt

__version__: str = _C.build_info()["version"]

__all__ = [
    "ConversionReport",
    "DefinedLayer",
    "Explanation",
    "Extras",
    "QuantizedRecurrent",
    "Reversed",
    "Session",
    "TbpttProgress",
    "__version__",
    "convert",
    "define_cell",
    "explain",
    "from_flashrnn",
    "from_haste",
    "from_keras",
    "from_onnx",
    "functional",
    "get_include",
    "get_library",
    "patch",
    "quantization_mapping",
    "quantize",
    "tbptt",
    "to_keras_weights",
    "unpatch",
]
__all__ += _cells.__all__
__all__ += _linear_time.__all__
__all__ += _minimal_gated.__all__
__all__ += _more_cells.__all__
__all__ += _rnn.__all__

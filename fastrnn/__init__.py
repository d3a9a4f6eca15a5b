"""fastrnn: fast drop-in replacements for ``torch.nn.RNN``, ``LSTM`` and ``GRU``.

>>> import torch, fastrnn
>>> rnn = fastrnn.LSTM(10, 20, num_layers=2)
>>> output, (h_n, c_n) = rnn(torch.randn(5, 3, 10))
>>> output.shape
torch.Size([5, 3, 20])
"""

from fastrnn import _C, functional
from fastrnn import flops as _flops  # noqa: F401 - registers the operators' formulas
from fastrnn.convert import ConversionReport, convert, patch, unpatch
from fastrnn.explanation import Explanation, explain
from fastrnn.modules import GRU, LSTM, RNN, GRUCell, LSTMCell, RNNCell
from fastrnn.quantization import quantization_mapping

__version__: str = _C.build_info()["version"]

__all__ = [
    "GRU",
    "LSTM",
    "RNN",
    "ConversionReport",
    "Explanation",
    "GRUCell",
    "LSTMCell",
    "RNNCell",
    "__version__",
    "convert",
    "explain",
    "functional",
    "patch",
    "quantization_mapping",
    "unpatch",
]

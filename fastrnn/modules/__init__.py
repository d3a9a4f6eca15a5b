"""Drop-in modules for ``torch.nn.RNN``, ``LSTM``, ``GRU`` and their cells."""

from fastrnn.modules.cells import GRUCell, LSTMCell, RNNCell
from fastrnn.modules.rnn import GRU, LSTM, RNN

__all__ = ["GRU", "LSTM", "RNN", "GRUCell", "LSTMCell", "RNNCell"]

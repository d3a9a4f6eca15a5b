"""Drop-in modules for ``torch.nn.RNN``, ``LSTM``, ``GRU`` and their cells."""

from fastrnn.modules.cells import *
from fastrnn.modules.linear_time import *
from fastrnn.modules.minimal_gated import *
from fastrnn.modules.more_cells import *
from fastrnn.modules.rnn import *

"""The values between stacked layers.

Layer k computes y_k from x_k. The output z_k of the stack up to it is, with x_0 the input:

    x_k = dropout(z_{k-1})
    z_k = y_k               without residual connections, and for k = 0
    z_k = y_k + z_{k-1}     with residual connections
"""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import dropout as dropout_function

from fastrnn.layer_call import Options


def layer_input(z: Tensor, layer: int, options: Options) -> Tensor:
    """Returns the input of a layer from the output of the layer below, or of the first layer."""
    if layer > 0 and options.dropout != 0:  # torch raises for a negative number or NaN
        return dropout_function(z, options.dropout, training=True)
    return z


def layer_output(y: Tensor, z: Tensor, layer: int, options: Options) -> Tensor:
    """Returns the output of the stack up to a layer.

    Args:
        y: what the layer returns.
        z: the output of the layer below, before dropout.
        layer: its index k.
        options: the options of the stack.
    """
    return y + z if options.residual and layer > 0 else y

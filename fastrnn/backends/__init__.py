"""Backends: the ways to compute a call, one module each. `fastrnn.engine.choose` selects one.

Every module implements `Backend`. A reason is a template with ``{cell}``, ``{dtype}`` and
``{device}``; `fastrnn.engine.choose.skip_reason` fills it in.
"""

from __future__ import annotations

from typing import Protocol

from fastrnn.layer_call import LayerCall, Results


class Backend(Protocol):
    """A way to compute a call.

    Attributes:
        NAME: shown by `fastrnn.explain` and ``FASTRNN_VERBOSE``.
        WHOLE_STACK: whether `run` computes all stacked layers at once; otherwise one layer.
    """

    NAME: str
    WHOLE_STACK: bool

    def unsupported(self, call: LayerCall, /) -> str:
        """Returns the reason why this backend cannot compute a call, "" if it can."""
        ...

    def run(self, call: LayerCall, /) -> Results:
        """Computes a supported call."""
        ...

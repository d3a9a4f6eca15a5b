"""The ways to compute a call: one module each, in the order of `fastrnn.engine.choose`.

Every module has the contents of `Backend`. The reasons are templates that ``str.format`` fills in
where somebody reads them: ``{cell}``, ``{dtype}``, ``{device}``, ``{size}`` and ``{hidden}``.
"""

from __future__ import annotations

from typing import Protocol

from fastrnn.layer_call import LayerCall, Results


class Backend(Protocol):
    """A way to compute a call.

    Attributes:
        NAME: in `fastrnn.explain` and ``FASTRNN_VERBOSE``.
        WHOLE_STACK: whether `run` computes a stack of layers, else one layer at a time.
    """

    NAME: str
    WHOLE_STACK: bool

    def unsupported(self, call: LayerCall, /) -> str:
        """The reason why this backend does not serve a call, "" if it does."""
        ...

    def run(self, call: LayerCall, /) -> Results:
        """Computes a call that is supported."""
        ...

"""`fastrnn.define_cell`: a user's own cell in the fused kernels.

`trace` records the user's function as a `graph`, `derive` differentiates it and chooses the values
that forward saves, `source` writes the C++ header (`row_source` that of a step that reduces over
the units, `text` what both share), `library` compiles and loads it, `cell` registers the cell, and
`layer` is the base of the classes that users get.
"""

from fastrnn.define.cell import define_cell
from fastrnn.define.layer import DefinedLayer

__all__ = ["DefinedLayer", "define_cell"]

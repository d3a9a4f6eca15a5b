"""Diagnostics of recurrent layers: gradients over time, recurrent weights, saturation, dead units.

    from fastrnn.diagnostics import diagnose

    print(diagnose(model, batch))

Imports torch only; tables and plots import rich and matplotlib, the extra ``fastrnn[diagnostics]``.
"""

from fastrnn.diagnostics.diagnose import diagnose, sum_of_squares
from fastrnn.diagnostics.report import Diagnosis, LayerDiagnosis

__all__ = ["Diagnosis", "LayerDiagnosis", "diagnose", "sum_of_squares"]

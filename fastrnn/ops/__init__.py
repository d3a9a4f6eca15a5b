"""The kernels as torch operators: how Python calls them, their shapes, and their derivatives."""

from fastrnn.ops import fakes as _fakes  # noqa: F401 - registers the operators' shapes
from fastrnn.ops.autograd import kernel_layer
from fastrnn.ops.composite import composite_layer
from fastrnn.ops.operators import (
    DEVICES,
    DTYPES,
    HALF,
    captured_layer,
    forward_op,
    infer_stack,
    raise_unless_rejected,
    records_gradient,
)
from fastrnn.ops.ragged import ragged_layer
from fastrnn.ops.recompute import recomputed_layer, recomputes
from fastrnn.ops.scan import scan
from fastrnn.ops.scan_layer import (
    ScanCall,
    ScanInputs,
    composite_scan_layer,
    reason_against_kernels,
    scan_layer,
)

__all__ = [
    "DEVICES",
    "DTYPES",
    "HALF",
    "ScanCall",
    "ScanInputs",
    "captured_layer",
    "composite_layer",
    "composite_scan_layer",
    "forward_op",
    "infer_stack",
    "kernel_layer",
    "ragged_layer",
    "raise_unless_rejected",
    "reason_against_kernels",
    "recomputed_layer",
    "recomputes",
    "records_gradient",
    "scan",
    "scan_layer",
]

"""Does every operation do on this machine what its definition says? The logic behind `fastamp check`.

The contract, element by element: |ours - truth| ≤ |PyTorch - truth| + tolerance, where the truth is the definition
(`fastamp.reference`) in float64 on the same inputs, and PyTorch is the definition run in the inputs' dtype.
"""

from fastamp.conformance.cases import OperationCase, StepCase, cases
from fastamp.conformance.contract import TOLERANCES, Report, Row, check, check_case, places
from fastamp.conformance.table import print_report

__all__ = [
    "TOLERANCES",
    "OperationCase",
    "Report",
    "Row",
    "StepCase",
    "cases",
    "check",
    "check_case",
    "places",
    "print_report",
]

"""Does every operation do on this machine what its definition says? The logic behind `fastamp check`.

The contract, element by element: |ours - truth| ≤ |PyTorch - truth| + tolerance, where the truth is the definition
(`fastamp.reference`) in float64 on the same inputs, and PyTorch is the definition run in the inputs' dtype.
"""

from fastamp.conformance.case import Case
from fastamp.conformance.cases import StepCase, cases
from fastamp.conformance.contract import TOLERANCES, Report, Row, check, check_case, places
from fastamp.conformance.operations import EmbeddingCase, OperationCase, SelectionCase
from fastamp.conformance.table import print_report

__all__ = [
    "TOLERANCES",
    "Case",
    "EmbeddingCase",
    "OperationCase",
    "Report",
    "Row",
    "SelectionCase",
    "StepCase",
    "cases",
    "check",
    "check_case",
    "places",
    "print_report",
]

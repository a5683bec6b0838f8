"""A report as a table in the terminal."""

from __future__ import annotations

from rich.console import Console
from rich.text import Text

from fastamp.conformance.contract import Report
from fastamp.tables import print_table

_SHOWN = 3  # failures of one row


def print_report(report: Report, console: Console | None = None) -> None:
    """Prints a row for every operation, device, backend and dtype, then what failed and what was not there.

    Args:
        report: what `check` gave.
        console: where to; the standard output by default.
    """
    console = console or Console()
    rows = []
    for row in report.rows:
        numbers = (str(row.cases), f"{row.worst:.1e}", f"{row.worst_pytorch:.1e}")
        kept = Text("yes", "green") if row.ok else Text("NO", "red")
        rows.append((row.op, f"{row.backend} {row.device}", row.dtype, *numbers, kept))
    print_table(
        console,
        ("op", "on", "dtype", "cases", "worst", "PyTorch's", "ok"),
        rows,
        names=3,
        caption="errors against the definition in float64; PyTorch: the definition in the same dtype",
    )
    for row in report.rows:
        where = f"{row.op}, {row.backend} on {row.device}, {row.dtype}"
        for line in row.failures[:_SHOWN]:
            console.print(f"failed: {where}: {line}", markup=False, highlight=False, soft_wrap=True)
        if len(row.failures) > _SHOWN:
            console.print(f"failed: {where}: {len(row.failures) - _SHOWN} more, all of them in --out")
    for line in report.absent:
        console.print(f"not checked: {line}", markup=False, highlight=False, soft_wrap=True)
    failed = sum(not row.ok for row in report.rows)
    verdict = "every row keeps the contract" if report.ok else f"{failed} of {len(report.rows)} rows break the contract"
    console.print(f"{verdict}: |ours - truth| <= |PyTorch - truth| + tolerance", markup=False, highlight=False)

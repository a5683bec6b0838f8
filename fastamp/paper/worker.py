"""What the process of one training run does.

What needs torch is imported where it is used: an interrupt is to be ignored before the import, which takes seconds.
"""

from __future__ import annotations

import os
import signal
import threading
import time
import traceback
import warnings
from dataclasses import asdict, dataclass
from multiprocessing import parent_process
from multiprocessing.connection import wait
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock

if TYPE_CHECKING:
    from fastamp.paper.plan import Run
    from fastamp.training import TrainConfig

LOCK = ".lock"  # in the run's folder
# The process of a runner that was killed ends itself within moments.
_ORPHAN_SECONDS = 60.0


@dataclass(frozen=True)
class Job:
    """A run to be done: what it is, how it is trained, and the folder where it works, which is there already."""

    run: Run
    config: TrainConfig
    folder: Path
    curves: bool = False  # whether a figure needs its loss against λ


def prepare() -> None:
    """Leaves interrupts and warnings to the parent process, and ends this process with it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    warnings.filterwarnings("ignore", "dataset .* a share of")  # which the parent has shown
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    # A runner killed outright cannot end its processes, and the next one would write into the same folders.
    parent = parent_process()
    if parent is not None:
        wait([parent.sentinel])
        os._exit(1)


def record(job: Job, status: str, seconds: float, **fields: Any) -> dict[str, Any]:
    """What the results say of a run: what it is, the given fields, how long it took, and where."""
    import torch

    import fastamp
    from fastamp.benchmarking.machine import device_name

    device = device_name(torch.device(job.config.device))
    versions = {"torch": torch.__version__, "fastamp": fastamp.__version__}
    return {
        "status": status,
        "key": job.run.key,
        **asdict(job.run),
        "config": job.config.to_dict(),
        **fields,
        "seconds": round(seconds, 3),
        "machine": {"device": device, **versions, "threads": job.config.threads},
    }


def execute(job: Job) -> dict[str, Any]:
    """Trains a run, or goes on with it, and takes its loss against λ where that is asked for.

    Returns:
        the run's record: "done" or, whatever was raised, "failed".
    """
    began = time.monotonic()
    try:
        from fastamp.training import train
        from fastamp.training.checkpoint import load_lines
        from fastamp.training.curves import loss_curves

        with FileLock(job.folder / LOCK, timeout=_ORPHAN_SECONDS):
            result = train(job.config, job.folder)
            lines = load_lines(job.folder / "metrics.jsonl", "--retry-failed makes the run again")
            fields: dict[str, Any] = {
                "result": asdict(result),
                "history": [line for line in lines if not line.get("final")],
                "curves": loss_curves(job.config, job.folder) if job.curves else None,
            }
        status = "done"
    except Exception as error:  # of one run: the others go on
        first = (str(error).splitlines() or [""])[0]
        text = "".join(traceback.format_exception(error))
        fields, status = {"error": f"{type(error).__name__}: {first}", "traceback": text}, "failed"
    return record(job, status, time.monotonic() - began, **fields)

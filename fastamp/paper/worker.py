"""A process that trains one run after another.

It starts in a process of its own, so what needs torch is imported where it is used: an interrupt is to be ignored
before the import, which takes seconds.
"""

from __future__ import annotations

import os
import signal
import threading
import time
import traceback
from dataclasses import asdict, dataclass
from multiprocessing import parent_process
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock

if TYPE_CHECKING:
    from fastamp.paper.plan import Run
    from fastamp.training import TrainConfig

LOCK = ".lock"  # in the run's folder
# An orphan of a runner that was killed ends itself within moments.
_ORPHAN_SECONDS = 60.0


@dataclass(frozen=True)
class Job:
    """A run to be done.

    Attributes:
        run: what it is.
        config: how it is trained.
        folder: where it works; there already.
    """

    run: Run
    config: TrainConfig
    folder: Path


def work(connection: Connection) -> None:
    """Receives jobs and sends their records, until the other end is closed or the parent process is gone.

    A job that cannot be read has no record; what is sent is its `failure`.
    """
    # The parent alone answers an interrupt from the terminal.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    while True:
        try:
            job = connection.recv()
        except EOFError:
            return
        except Exception as error:  # a job brings the imports of its parts, and one may be broken
            connection.send(failure(error))
        else:
            connection.send(execute(job))


def failure(error: BaseException) -> dict[str, str]:
    """An exception, as a failed run's record tells it."""
    first = (str(error).splitlines() or [""])[0]
    return {"error": f"{type(error).__name__}: {first}", "traceback": "".join(traceback.format_exception(error))}


def _end_with_parent() -> None:
    # A runner killed outright cannot end its workers, and the next one would write into the same folders.
    parent = parent_process()
    if parent is not None:
        wait([parent.sentinel])
        os._exit(1)


def record(job: Job, status: str, seconds: float, **fields: Any) -> dict[str, Any]:
    """What the results say of a run: what it is, the given fields, how long it took, and where."""
    import torch

    import fastamp
    from fastamp.benchmarking.machine import device_name

    try:
        device = device_name(torch.device(job.config.device))
    except (RuntimeError, AssertionError):  # one that cannot be used, which is why the run failed
        device = job.config.device
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
    """Trains a run, or goes on with it, and takes its loss against λ.

    Returns:
        the run's record: "done" or, whatever was raised, "failed".
    """
    from fastamp.training import train
    from fastamp.training.checkpoint import load_lines
    from fastamp.training.curves import loss_curves

    began = time.monotonic()
    try:
        with FileLock(job.folder / LOCK, timeout=_ORPHAN_SECONDS):
            _leave_other_device(job)
            result = train(job.config, job.folder)
            lines = load_lines(job.folder / "metrics.jsonl", "--retry-failed makes the run again")
            fields: dict[str, Any] = {
                "result": asdict(result),
                "history": [line for line in lines if not line.get("final")],
                "curves": loss_curves(job.config, job.folder),
            }
        status = "done"
    except Exception as error:  # of one run: the others go on
        fields = failure(error)
        status = "failed"
    return record(job, status, time.monotonic() - began, **fields)


def _leave_other_device(job: Job) -> None:
    """Starts over a run that was under way on another device, whose numbers this one does not continue."""
    from fastamp.training.checkpoint import load_json

    described = job.folder / "config.json"
    if described.exists() and load_json(described).get("device") != job.config.device:
        # config.json last: a folder that has other files alone is nobody's.
        others = [path for path in job.folder.iterdir() if path.name not in (LOCK, described.name)]
        for path in (*others, described):
            path.unlink()

"""Runs of the paper without processes of their own, each of which takes seconds to start."""

import multiprocessing
import time

from fastamp.paper import runner, worker


class InThisProcess(runner._Worker):
    """Takes the place of the runner's process; works at a run when it is given."""

    def __init__(self):
        self.connection, self.other = multiprocessing.Pipe()

    def give(self, job):
        job.folder.mkdir(parents=True, exist_ok=True)
        self.job, self.began = job, time.monotonic()
        self.other.send(worker.execute(job))

    def end(self):
        self.connection.close()
        self.other.close()

"""Runs of the paper without processes of their own, each of which takes seconds to start."""

from concurrent.futures import Future


class InThisProcess:
    """Takes the place of the runner's ProcessPoolExecutor; works at a job when it is submitted."""

    def __init__(self, *arguments, **options):
        pass

    def submit(self, function, job):
        future = Future()
        future.set_result(function(job))
        return future

    def shutdown(self):
        pass

"""Where the points of a sweep run: in worker processes of this machine, or of a Dask cluster.

A worker is a pool of one process, so its death, or a point that takes too long, is one point's and
stops no other. A worker watches its parent: whatever a sweep started ends with it, also when the
sweep is killed. Kernels watch their worker in the same way (ipykernel's own thread does).
"""

import contextlib
import gc
import math
import os
import signal
import sys
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent import futures
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import current_process

from joblib import cpu_count
from joblib.externals.loky.backend.utils import kill_process_tree
from joblib.externals.loky.process_executor import ProcessPoolExecutor

from ..errors import BadInput, named, shown
from .sweep_worker import Outcome

WATCH_S = 0.5  # between two looks at the parent
MOST_DEATHS = 2  # of the workers of one point, which is then failed
MOST_STARTS = 5  # deaths of workers that ran nothing yet; then the machine is to blame
DASK_S = 20.0  # a scheduler, and its first worker, must answer by then
KILLED = "its worker was killed each time it ran: is memory short?"
THREADS = ("OMP", "OPENBLAS", "MKL", "BLIS", "NUMEXPR", "NUMBA")  # libraries' <name>_NUM_THREADS
ENDING = signal.SIGINT, signal.SIGTERM, signal.SIGHUP


# --- on this machine ------------------------------------------------------------------------------


class Worker:
    """A process that runs one point after the other."""

    def __init__(self, jobs: int):
        limit = {f"{name}_NUM_THREADS": str(max(1, cpu_count() // jobs)) for name in THREADS}
        self._environment = limit if jobs > 1 else {}
        self._start()

    def _start(self) -> None:
        self._pool = ProcessPoolExecutor(
            1, initializer=_end_with, initargs=(os.getpid(),), env=self._environment
        )
        self.point = None  # while the process starts: a time limit does not count imports
        self.future: futures.Future | None = self._pool.submit(Outcome, 0.0)
        self._ends_at = math.inf

    @property
    def left_s(self) -> float:
        """Seconds that the point may still run."""
        return max(0.0, self._ends_at - time.monotonic())

    @property
    def is_due(self) -> bool:
        return self.future.done() or not self.left_s

    def outcome(self, too_long: str) -> Outcome | None:
        """The outcome of the point; None where the process died."""
        if not self.future.done():
            self.kill()
            return Outcome(0.0, error=too_long)
        try:
            return self.future.result()
        except BrokenProcessPool:
            self.kill()
            return None
        except Exception as error:  # the outcome could not be sent
            return Outcome(0.0, error=named(error))

    def go_on(self, task: Callable, left: deque, limit_s: float) -> None:
        """Begin the next of the points ``left``, in a new process where the old one is gone."""
        if not left:
            self.kill()
        elif self._pool is None:
            self._start()
        else:
            try:
                self.future = self._pool.submit(task, left[0])
            except BrokenProcessPool:  # it died between two points
                self.kill()
                self._start()
                return
            self.point = left.popleft()
            self._ends_at = time.monotonic() + limit_s

    def kill(self) -> None:
        """End the process and all that it started."""
        if self._pool is not None:
            self._pool.shutdown(kill_workers=True)
        self._pool = self.future = None


def _end_with(parent: int) -> None:
    """Begin a worker: the terminal's signals are the sweep's, and the sweep's end is its own."""
    os.setsid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(WATCH_S)
        kill_process_tree(current_process())

    threading.Thread(target=watch, daemon=True).start()


def in_workers(
    task: Callable[..., Outcome], points: Sequence, jobs: int, limit_s: float, too_long: str
) -> Iterator[tuple[object, Outcome]]:
    """Each point with its outcome, in the order in which points end. A point that runs for
    ``limit_s`` is failed with the words ``too_long``; one whose workers die, too.
    """
    left, deaths, workers = deque(points), Counter(), []
    try:
        for _ in range(min(jobs, len(points))):
            workers.append(Worker(jobs))
        while busy := [worker for worker in workers if worker.future is not None]:
            first = min(worker.left_s for worker in busy)
            futures.wait(
                [worker.future for worker in busy],
                None if math.isinf(first) else first,
                futures.FIRST_COMPLETED,
            )
            for worker in busy:
                if not worker.is_due:
                    continue
                point, outcome = worker.point, worker.outcome(too_long)
                if outcome is None:
                    name = None if point is None else point.name
                    deaths[name] += 1
                    if deaths[None] == MOST_STARTS:
                        raise BadInput("worker processes end before they run: is memory short?")
                    if point is not None and deaths[name] < MOST_DEATHS:
                        left.appendleft(point)
                        point = None
                    outcome = Outcome(0.0, error=KILLED)
                elif point is None:
                    deaths[None] = 0
                if point is not None:
                    yield point, outcome
                worker.go_on(task, left, limit_s)
    finally:
        for worker in workers:
            worker.kill()


# --- on a Dask cluster ----------------------------------------------------------------------------


def on_dask(
    task: Callable[..., Outcome], points: Sequence, address: str
) -> Iterator[tuple[object, Outcome]]:
    """Each point with its outcome, as `in_workers`; the cluster starts its workers anew itself.

    Dask blames a worker's death on all that waited there, so whatever is blamed runs once more,
    alone, last of all.
    """
    try:
        from distributed import Client
    except ImportError as error:
        raise BadInput(
            "dask needs the package distributed: pip install 'cortexlab[dask]'"
        ) from error
    try:
        client = Client(address, timeout=f"{DASK_S:g}s")
    except (OSError, ValueError) as error:
        raise BadInput(f"no Dask scheduler answers at {shown(address)}") from error
    with client:
        _want_workers(client, address)
        blamed = []
        for point, outcome in _gathered(client, task, points, address):
            if outcome is None:
                blamed.append(point)
            else:
                yield point, outcome
        for each in blamed:
            for point, outcome in _gathered(client, task, [each], address):
                yield point, outcome or Outcome(0.0, error=KILLED)


def _gathered(
    client, task: Callable, points: Sequence, address: str
) -> Iterator[tuple[object, Outcome | None]]:
    """Each point with its outcome, or None where its worker was killed."""
    from distributed import CancelledError, KilledWorker, wait

    running = {client.submit(task, point, pure=False): point for point in points}
    while running:
        try:
            ended = wait(list(running), timeout=DASK_S, return_when="FIRST_COMPLETED").done
        except TimeoutError:
            _want_workers(client, address)
            continue
        for future in ended:
            try:
                outcome = future.result()
            except KilledWorker:
                outcome = None
            except CancelledError as error:
                raise BadInput(
                    f"the Dask scheduler at {shown(address)} went away: what is finished is kept, "
                    "the same command goes on"
                ) from error
            except Exception as error:  # the outcome could not be sent
                outcome = Outcome(0.0, error=named(error))
            yield running.pop(future), outcome


def _want_workers(client, address: str) -> None:
    try:
        client.wait_for_workers(1, timeout=DASK_S)
    except TimeoutError as error:
        raise BadInput(
            f"the Dask scheduler at {shown(address)} has no workers: what is finished is kept"
        ) from error


# --- signals --------------------------------------------------------------------------------------


class _Ended(BaseException):
    """A signal that ends this process has come."""


@contextlib.contextmanager
def ended_by_signals() -> Iterator[None]:
    """Let SIGINT, SIGTERM and SIGHUP leave the block by an exception, once, so that what it started
    can end; then let the signal do what it does without this.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {
        number: signal.getsignal(number)
        for number in ENDING
        if signal.getsignal(number) not in (signal.SIG_IGN, None)  # nohup
    }

    def end(number: int, frame) -> None:
        for each, handler in before.items():  # a second Ctrl-C does not wait
            signal.signal(each, handler if each == signal.SIGINT else signal.SIG_IGN)
        raise KeyboardInterrupt if number == signal.SIGINT else _Ended(number)

    for each in before:
        signal.signal(each, end)
    ended = None
    try:
        yield
    except _Ended as error:
        (ended,) = error.args
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)
    if ended is not None:
        name = signal.Signals(ended).name
        print(
            f"ended by {name}: what is finished is kept, the same command goes on",
            file=sys.stderr,
            flush=True,
        )
        gc.collect()  # of the pools' semaphores, which loky else reports as leaked
        os.kill(os.getpid(), ended)

"""Who may write an engine's books, and when: one thread at a time, and never half of a change.

*The books* are what scheduler, block tables and requests say. The users' functions and the model
run while they are closed, so that a callback or another thread may submit, cancel and ask at any
time. An exception in open books (Ctrl-C comes at any line) leaves them torn: whoever opens them
next has them rebuilt first.
"""

import inspect
import time
from collections import deque
from collections.abc import Callable, Generator
from operator import call

from ..errors import CortexLabError


class Occupied(CortexLabError):
    """Somebody is inside."""


class Door:
    """Lets one caller in at a time. It is a running generator, which Python enters once only and
    leaves whatever is raised: a lock stays locked where an exception comes just before its release.
    """

    def __init__(self):
        self._entrance = _entrance()

    @property
    def is_occupied(self) -> bool:
        return self._live().gi_running

    @property
    def am_inside(self) -> bool:
        """Whether it was this thread that entered: the generator is among its callers."""
        frame, inside = inspect.currentframe(), self._live().gi_frame
        while frame is not None and frame is not inside:
            frame = frame.f_back
        return frame is not None

    def enter(self, call: Callable):
        """What ``call`` returns; `Occupied`, and nothing done, while another call is under way."""
        generator = self._live()
        try:
            return generator.send(call)
        except ValueError as error:
            if generator.gi_frame is None or str(error) != "generator already executing":
                raise
            raise Occupied(
                "a step is under way: until it is done, neither its callbacks nor another thread "
                "can call step() or run()"
            ) from None

    def _live(self) -> Generator:
        """The generator. An exception ends one; all threads agree on the next."""
        generator, following = self._entrance
        while generator.gi_frame is None:
            generator, following = self._entrance = following.setdefault(0, _entrance())
        return generator


def _entrance() -> tuple[Generator, dict]:
    generator = _calls()
    next(generator)
    return generator, {}


def _calls() -> Generator:
    call = yield
    while True:
        call = yield call()


class Books:
    """Books that ``rebuild`` can make anew, even after it was itself cut short."""

    def __init__(self, rebuild: Callable[[], None]):
        self._rebuild = rebuild
        self._door = Door()
        self._is_torn = False  # or open
        self._asked: deque[Callable[[], object]] = deque()

    def do(self, change: Callable, inside: Callable = call):
        """What ``change`` returns, called alone with the books. Raise nothing on purpose in it.

        ``inside`` is called with it instead, where this thread has the books open: a signal handler
        or a finalizer may come at any time.
        """
        while True:
            try:
                return self._door.enter(lambda: self._opened(change))
            except Occupied:
                if self._door.am_inside:
                    return inside(change)
                time.sleep(1e-5)  # never long: neither model nor users' functions run inside

    def ask(self, change: Callable[[], object]) -> None:
        """Have ``change`` made: at once, or, where this thread has the books open, when they close.
        It may be made twice.
        """
        self.do(change, inside=self._asked.append)

    def _opened(self, change: Callable):
        if self._is_torn:
            self._rebuild()
        self._is_torn = True
        result = change()
        while self._asked:
            self._asked[0]()  # again, if it is cut short
            self._asked.popleft()
        self._is_torn = False
        return result

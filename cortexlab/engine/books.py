"""Who may write an engine's books, and when: one thread at a time, and never half of a change.

*The books* are what scheduler, block tables and requests say. The model and the users' functions
(but for allocators and the clock) run while they are closed, so that a callback or another thread
may submit, cancel and ask at any time. An exception in open books (Ctrl-C comes at any line) leaves
them torn: whoever opens them next has them rebuilt first.
"""

import inspect
import time
from collections import deque
from collections.abc import Callable, Generator
from operator import call as call_it

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
        while True:
            try:
                return self._live().send(call)
            except (ValueError, StopIteration) as error:
                if error.__traceback__.tb_next is not None:  # raised inside, by the call
                    raise
                if isinstance(error, ValueError):
                    raise Occupied from None
                # Else an exception in another thread has just ended the generator.

    def wait(self, call: Callable, inside: Callable[[Callable], object] = call_it):
        """What ``call`` returns, once nobody else is inside; where this thread is, what ``inside``
        makes of it: a signal handler or a finalizer may come at any time.
        """
        while True:
            try:
                return self.enter(call)
            except Occupied:
                if self.am_inside:
                    return inside(call)
                time.sleep(1e-5)

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

    def do(self, change: Callable):
        """What ``change`` returns, called alone with the books. Raise nothing on purpose in it."""
        result = self._door.wait(lambda: self._opened(change), inside=lambda _: change())
        if self._asked and not self._door.am_inside:  # after the last look
            self.do(lambda: None)
        return result

    def ask(self, change: Callable[[], object]) -> None:
        """Have ``change`` made: at once, or, where this thread has the books open, when they close.
        It may be made twice.
        """
        self._door.wait(lambda: self._opened(change), inside=lambda _: self._asked.append(change))

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

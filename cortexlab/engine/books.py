"""Who may write an engine's books, and when: one thread at a time, and never half of a change.

*The books* are what scheduler, block tables and requests say. The users' functions and the model
run while they are closed, so that a callback or another thread may submit, cancel and ask at any
time. An exception in open books (Ctrl-C comes at any line) leaves them torn: whoever opens them
next has them rebuilt first.
"""

import time
from collections import deque
from collections.abc import Callable, Generator
from threading import get_ident

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
        self._keeper: int | None = None  # thread that has them open
        self._is_torn = False  # or open
        self._asked: deque[Callable[[], object]] = deque()

    def do(self, change: Callable):
        """What ``change`` returns, called alone with the books. Raise nothing on purpose in it."""
        while True:
            try:
                return self._door.enter(lambda: self._opened(change))
            except Occupied:
                if self._is_mine:
                    return change()
                time.sleep(1e-5)  # never long: neither model nor users' functions run inside

    def ask(self, change: Callable[[], object]) -> None:
        """Have ``change`` made: at once, or as soon as the books close, where a signal handler or a
        finalizer asks while its thread has them open.
        """
        self._asked.append(change)
        while self._asked and not self._is_mine:
            self.do(lambda: None)

    @property
    def _is_mine(self) -> bool:
        return self._door.is_occupied and self._keeper == get_ident()

    def _opened(self, change: Callable):
        self._keeper = get_ident()
        if self._is_torn:
            self._rebuild()
        self._is_torn = True
        result = change()
        while self._asked:
            self._asked.popleft()()
        self._is_torn, self._keeper = False, None
        return result

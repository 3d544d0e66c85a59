"""From tokens to text and events, and the ends they bring: what a request's owner sees of it.

    step ---- book ----> outbox of notices ---- tell ----> text, the users' functions, an event
              books open                        books closed

A notice stays in the outbox until the engine's caller has its event. Each part of telling it is
kept by one assignment, so that telling goes on where an exception stopped it: nothing is told
twice, and nothing is lost.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import repeat, starmap, takewhile
from operator import attrgetter
from typing import NamedTuple

import mlx.core as mx

from ..errors import is_own, named
from ..scheduler.request import Request, RequestState, TokenEvent
from .books import Books
from .detokenizer import TextState, TextStream
from .sampler import Choice, Chooser

_is_told, _event = attrgetter("is_told"), attrgetter("event")

END_STATES = {
    "stop": RequestState.FINISHED,
    "length": RequestState.FINISHED,
    "error": RequestState.FAILED,
    "cancelled": RequestState.CANCELLED,
    "timeout": RequestState.CANCELLED,
}


@dataclass(eq=False, slots=True)
class Generation(Request):
    """A request of the engine, with what its tokens are chosen and shown by."""

    chooser: Chooser | None = None
    stream: TextStream | None = None  # with a tokenizer
    is_careful: bool = False  # its steps read no slot but their own: see `Engine._book`


class Text(NamedTuple):
    """A notice's text: the stream's state after it, what it shows, all so far, whether a stop
    string has come.
    """

    state: TextState
    shown: str
    all: str
    stops: bool


@dataclass(eq=False, slots=True)
class Notice:
    """One token of a request, or (``token`` None) its end, until its event is taken."""

    request: Generation
    token: int | None
    reason: str | None = None  # why the request ends with it
    place: int = 0  # of the token in the output
    landed_at: float = 0.0
    random_state: mx.array | None = None  # after the token
    logprobs: dict[int, float] | None = None
    text: Text | None = None
    event: TokenEvent | None = None
    is_silent: bool = False  # not for the request's own consumer
    error: str | None = None  # of a function of the user's
    is_told: bool = False
    call: list[TokenEvent] = field(default_factory=list)  # arguments of the consumer
    calls: Iterator[list[TokenEvent]] = field(init=False)  # to be made

    def __post_init__(self):
        self.calls = iter([self.call])

    @classmethod
    def of(cls, request: Generation, token: int, choice: Choice | None, now: float) -> "Notice":
        """The notice of a request's next token."""
        told = (choice.state, choice.logprobs()) if choice is not None else ()
        return cls(request, token, None, len(request.output_tokens), now, *told)

    def book(self) -> None:
        """Add the token to its request, unless it is there."""
        request = self.request
        if self.token is None:
            return
        if request.state is RequestState.PREFILLING:  # not if preempted while it was pending
            request.enter(RequestState.DECODING, self.landed_at)
        if self.random_state is not None:
            request.chooser.state = self.random_state
        for of_request, new in (
            (request.token_times, self.landed_at),
            (request.logprobs, self.logprobs),
            (request.output_tokens, self.token),
        ):
            if new is not None and len(of_request) == self.place:
                of_request.append(new)


class OutputProcessor:
    """Delivers tokens to requests. ``end(request, reason)`` takes a request out of the engine."""

    def __init__(self, books: Books, end: Callable[[Request, str], None]):
        self.outbox: deque[Notice] = deque()
        self._books, self._end = books, end

    # --- with open books --------------------------------------------------------------------------

    def book(self, notices: Sequence[Notice]) -> None:
        """Add tokens to their requests, to be told later."""
        self.outbox.extend(notices)
        for notice in notices:
            notice.book()

    def end(self, request: Request, reason: str, error: str | None = None, silent=False) -> None:
        """End a request without a token; ``silent``: its consumer is not told."""
        request.error, request.finish_reason = error, reason  # from here on, a repair ends it
        self.outbox.append(Notice(request, None, reason, is_silent=silent))
        self._end(request, reason)

    def repair(self, live: Iterable[Generation]) -> None:
        """Book again what an exception kept from the ``live`` requests, and from the outbox."""
        for notice in self.outbox:
            notice.book()
        told = {notice.request for notice in self.outbox if notice.token is None}
        for request in live:
            reason = request.finish_reason  # "stop" and "length" come with the last token
            is_own = END_STATES.get(reason, RequestState.FINISHED) is not RequestState.FINISHED
            if is_own and request not in told:
                self.outbox.append(Notice(request, None, reason))

    # --- with closed books ------------------------------------------------------------------------

    def tell(self) -> None:
        """Call the users' functions for each notice, and end requests with their last token."""
        while untold := [notice for notice in tuple(self.outbox) if not notice.is_told]:
            for notice in untold:
                self._tell(notice)

    def tell_end(self, request: Generation) -> None:
        """Tell a request's end at once, unless there is something to be told before."""
        untold = [notice for notice in tuple(self.outbox) if not notice.is_told]
        if untold and untold[0].request is request and untold[0].token is None:
            self._tell(untold[0])

    @property
    def num_told(self) -> int:
        """Notices whose events can be taken."""
        return sum(1 for _ in takewhile(_is_told, tuple(self.outbox)))

    def take(self) -> Iterator[TokenEvent]:
        """Events that can be taken, each as it is asked for; written in C, so that no signal comes
        between taking and giving.
        """
        return map(_event, map(deque.popleft, repeat(self.outbox, self.num_told)))

    def _tell(self, notice: Notice) -> None:
        if notice.event is None:
            self._form(notice)
        if notice.request.on_token and not notice.is_silent:
            try:
                # Taken and called in C, so that no signal comes between.
                deque(starmap(notice.request.on_token, notice.calls), maxlen=0)
            except BaseException as raised:
                if not is_own(raised):
                    raise
                notice.error, notice.is_silent = f"its token consumer raised {named(raised)}", True
        if notice.error or (notice.reason and notice.token is not None):
            self._books.do(partial(self._close, notice))
        notice.is_told = True

    def _form(self, notice: Notice) -> None:
        """Find a notice's text, whether its request ends with it, and its event."""
        request, has_token, function = notice.request, notice.token is not None, "tokenizer"
        try:
            if request.stream and notice.text is None:
                notice.text = _text(notice)
            if notice.text:
                request.stream.state, _, request.text, _ = notice.text
            function = "stop function"
            if has_token and request.finish_reason is None:
                notice.reason = _reason(notice)
        except BaseException as raised:
            if not is_own(raised):
                raise
            notice.error = f"its {function} raised {named(raised)}"
        shown = notice.text.shown if notice.text and (has_token or notice.text.shown) else None
        event = TokenEvent(request.id, notice.token, notice.reason, shown, notice.logprobs)
        notice.call[:] = [event]
        notice.event = event

    def _close(self, notice: Notice) -> None:
        """End the request of a told notice, by its last token or by what a function raised."""
        request = notice.request
        if request.finish_reason is None:
            if notice.error:
                self.end(request, "error", notice.error, silent=notice.is_silent)
            else:
                self._end(request, notice.reason)
        elif notice.error and not request.error:
            request.error = notice.error
        if notice.token is not None and request.finish_reason != notice.reason:
            notice.event = replace(notice.event, finish_reason=None)


def _text(notice: Notice) -> Text:
    """What can be shown with a notice: all that is held back, where no more tokens come. A stop
    token says nothing.
    """
    request, stream, tokens = notice.request, notice.request.stream, notice.request.output_tokens
    count = notice.place + 1 if notice.token is not None else len(tokens)
    is_stop = notice.token in request.stop_token_ids
    is_last = notice.token is None or is_stop or count >= request.max_tokens
    state, shown, stops = (stream.rest if is_last else stream.after)(tokens, count - is_stop)
    return Text(state, shown, request.text + shown, stops)


def _reason(notice: Notice) -> str | None:
    """Why a request ends with this token, if it does."""
    request, text = notice.request, notice.text
    if notice.token in request.stop_token_ids or (text and text.stops):
        return "stop"
    if request.stop_when and request.stop_when(request):
        if text:
            tokens, count = request.output_tokens, notice.place + 1
            state, more, _ = request.stream.rest(tokens, count)
            notice.text = Text(state, text.shown + more, text.all + more, stops=True)
            request.stream.state, _, request.text, _ = notice.text
        return "stop"
    return "length" if notice.place + 1 >= request.max_tokens else None

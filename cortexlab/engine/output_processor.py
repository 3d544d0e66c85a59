"""From tokens to text and events, and the ends they bring: what a request's owner sees of it.

    step ---- book ----> outbox of notices ---- tell ----> text, the users' functions ----> events
              books open                        books closed

A notice stays in the outbox until it is told. Each part of telling it is kept by one assignment,
so that telling goes on where an exception stopped it: nothing is told twice, and nothing is lost.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from operator import length_hint
from typing import NamedTuple

import mlx.core as mx

from ..errors import is_own, named
from ..scheduler.request import Request, RequestState, TokenEvent
from .books import Books
from .detokenizer import TextState, TextStream
from .sampler import Choice, Chooser

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
    is_careful: bool = False  # in its steps no row reads another sequence's slots


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
    """One token of a request, or (``token`` None) its end, until it is told."""

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
    told: list[TokenEvent] = field(default_factory=list)  # what the consumer is called with
    calls: Iterator[TokenEvent] = field(init=False)  # of it, not made yet

    def __post_init__(self):
        self.calls = iter(self.told)

    @classmethod
    def of(cls, request: Generation, token: int, choice: Choice | None, now: float) -> "Notice":
        """The notice of a request's next token."""
        told = (choice.state, choice.logprobs()) if choice is not None else ()
        return cls(request, token, None, len(request.output_tokens), now, *told)

    def book(self) -> None:
        """Add the token to its request, unless it is there."""
        request = self.request
        if self.token is None or len(request.output_tokens) > self.place:
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
        self.events: list[TokenEvent] = []  # told, not taken
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
        outbox = tuple(self.outbox)
        for notice in outbox:
            notice.book()
        told = {notice.request for notice in outbox if notice.token is None}
        for request in live:
            reason = request.finish_reason  # "stop" and "length" come with the last token
            is_own = END_STATES.get(reason, RequestState.FINISHED) is not RequestState.FINISHED
            if is_own and request not in told:
                self.outbox.append(Notice(request, None, reason))

    # --- with closed books ------------------------------------------------------------------------

    def tell(self) -> None:
        """Call the users' functions for each notice, and end requests with their last token."""
        while self.outbox:
            self._tell(self.outbox[0])

    def take(self) -> list[TokenEvent]:
        """All events that can be taken."""
        # No call, on one line: neither a signal nor a tracer nor a thread comes between.
        taken, self.events = self.events, []; return taken  # noqa: E702  # fmt: skip

    def take_each(self) -> Iterator[TokenEvent]:
        """Events that can be taken, each as it is asked for."""
        while self.events:
            event = self.events[0]
            del self.events[0]; yield event  # noqa: E702  # fmt: skip

    def _tell(self, notice: Notice) -> None:
        if notice.event is None:
            self._form(notice)
        if notice.request.on_token and not notice.is_silent:
            try:
                call_each(notice.request.on_token, notice.calls)
            except BaseException as raised:
                if not is_own(raised):
                    raise
                notice.error, notice.is_silent = f"its token consumer raised {named(raised)}", True
        if notice.error or (notice.reason and notice.token is not None):
            self._books.do(partial(self._close, notice))
        if self.outbox and self.outbox[0] is notice:
            self.events += [notice.event]; del self.outbox[0]  # noqa: E702  # fmt: skip

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
                reason = _reason(notice)
                notice.reason = reason if request.finish_reason is None else None
        except BaseException as raised:
            if not is_own(raised):
                raise
            notice.error = f"its {function} raised {named(raised)}"
        shown = notice.text.shown if notice.text and (has_token or notice.text.shown) else None
        event = TokenEvent(request.id, notice.token, notice.reason, shown, notice.logprobs)
        notice.told[:] = [event]
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
        told = notice.event.finish_reason
        if told and request.finish_reason != told:
            notice.event = replace(notice.event, finish_reason=None)
            for end in self.outbox:  # of which its consumer has been told
                end.is_silent |= end.request is request


def call_each(function: Callable, calls: Iterator) -> None:
    """Call ``function`` with each of ``calls``, taken in C: no signal comes between taking one and
    calling.
    """
    num_calls = length_hint(calls)
    if len([*map(function, calls)]) < num_calls:
        raise RuntimeError("it raised StopIteration")


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

"""From tokens to text and events, and the ends they bring: what a request's owner sees of it."""

from collections import deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace

from ..errors import shown
from ..scheduler.request import Request, RequestState, TokenEvent
from .detokenizer import TextStream
from .sampler import Choice, Chooser


@dataclass(eq=False, slots=True)
class Generation(Request):
    """A request of the engine, with what its tokens are chosen and shown by."""

    chooser: Chooser | None = None
    stream: TextStream | None = None  # with a tokenizer


class OutputProcessor:
    """Delivers tokens to requests. ``events`` wait for the engine's caller; ``end(request, state,
    reason)`` takes a request out of the engine.
    """

    def __init__(self, vocabulary: int, end: Callable[[Request, RequestState, str], None]):
        self.events: deque[TokenEvent] = deque()
        self._vocabulary = vocabulary
        self._end = end

    def deliver(self, request: Generation, token: int, choice: Choice | None, now: float) -> None:
        """Add a token to its request, tell it, and end the request where it is the last."""
        if (last := self._vocabulary - 1) < token:
            self.fail(request, f"its sampler returned token {token}, but tokens go up to {last}")
            return
        if request.state is RequestState.PREFILLING:  # not if preempted while the token was pending
            request.enter(RequestState.DECODING, now)
        request.output_tokens.append(token)
        request.token_times.append(now)
        if choice is not None:
            request.chooser.state = choice.state
            if (logprobs := choice.logprobs()) is not None:
                request.logprobs.append(logprobs)
        reason, text = "stop" if token in request.stop_token_ids else None, None
        if request.stream:
            text, reason = _text(request, token, reason)
        place, error = len(self.events), None
        try:
            if reason is None and request.stop_when and request.stop_when(request):
                reason, text = "stop", _rest(request, text)
        except Exception as raised:
            error = raised
        if reason is None and len(request.output_tokens) == request.max_tokens:
            reason = "length"
        logprobs = request.logprobs[-1] if request.logprobs else None
        event = TokenEvent(request.id, token, reason, text, logprobs)
        self.events.insert(place, event)  # before the end of a request that its function cancels
        try:
            if request.on_token and error is None:
                request.on_token(event)
        except Exception as raised:
            error = raised
        finally:  # the last token has come, even if the whole run is interrupted here
            if reason and error is None and request.finish_reason is None:
                self._end(request, RequestState.FINISHED, reason)
        if reason and request.state is not RequestState.FINISHED:
            self.events[place] = replace(event, finish_reason=None)
        if error is not None:
            raised = f"{type(error).__name__}: {shown(str(error))}"
            self.fail(request, f"its stop function or token consumer raised {raised}", tell=False)

    def fail(self, request: Request, error: str, tell: bool = True) -> None:
        """End a request by an error, unless its own consumer has cancelled it before."""
        if request.finish_reason is not None:
            return
        request.error = error
        self.end(request, RequestState.FAILED, "error", tell)

    def end(self, request: Request, state: RequestState, reason: str, tell: bool = True) -> None:
        """End a request without a token. An exception of its consumer is dropped: there is nothing
        left to end.
        """
        self._end(request, state, reason)
        event = TokenEvent(request.id, None, reason)
        self.events.append(event)
        if tell and request.on_token:
            with suppress(Exception):
                request.on_token(event)


def _text(request: Generation, token: int, reason: str | None) -> tuple[str, str | None]:
    """What can be shown after ``token``, and the reason to stop. A stop token says nothing."""
    stream, text = request.stream, ""
    if reason is None:
        text, stopped = stream.add(token)
        reason = "stop" if stopped else None
    if len(request.output_tokens) == request.max_tokens and reason is None:
        more, stopped = stream.finish()
        text, reason = text + more, "stop" if stopped else None
    elif reason and token in request.stop_token_ids:
        text = stream.finish()[0]
    request.text += text
    return text, reason


def _rest(request: Generation, text: str | None) -> str | None:
    """``text`` and what is held back after it, when no more tokens come."""
    if request.stream is None or len(request.output_tokens) == request.max_tokens:
        return text
    more, _ = request.stream.finish()
    request.text += more
    return text + more

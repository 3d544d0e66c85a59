"""A request, its states, and the time stamps that latency is computed from."""

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum

from .block_table import BlockTable, Need


class RequestState(StrEnum):
    """Pending -> prefilling -> decoding -> finished, failed, cancelled; preempted -> prefilling."""

    PENDING = "pending"
    PREFILLING = "prefilling"
    DECODING = "decoding"
    PREEMPTED = "preempted"
    FINISHED = "finished"
    FAILED = "failed"
    CANCELLED = "cancelled"


@dataclass(frozen=True, slots=True)
class TokenEvent:
    """One token of one request, or (``token`` None) only its end. ``finish_reason`` is set on
    the last event.

    ``text``, with a tokenizer: what can be shown now; half a character, or the beginning of a stop
    string, waits. ``logprobs``, where asked for: token -> log-probability, sampled token first.
    """

    request_id: str
    token: int | None
    finish_reason: str | None = None
    text: str | None = None
    logprobs: Mapping[int, float] | None = None


@dataclass(eq=False, slots=True)
class Request:
    """Up to ``max_tokens`` tokens wanted after ``prompt``. Times are seconds on the engine's clock;
    None: not reached.
    """

    id: str
    prompt: tuple[int, ...]
    max_tokens: int
    stop_token_ids: frozenset[int] = frozenset()
    arrived_at: float = 0.0
    prefix_ids: tuple[Hashable, ...] = ()  # ids of the prompt's blocks: see `Need`
    priority: int = 0  # lowest number first
    timeout_s: float | None = None  # seconds after its arrival at which it ends
    on_token: Callable[[TokenEvent], None] | None = None  # called with each event
    stop_when: Callable[["Request"], bool] | None = None  # asked after each token; True: stop

    state: RequestState = RequestState.PENDING
    output_tokens: list[int] = field(default_factory=list)
    text: str = ""  # output as text, with a tokenizer; a final stop string is left out
    logprobs: list[Mapping[int, float]] = field(default_factory=list)  # one per output token
    finish_reason: str | None = None
    error: str | None = None
    cached_tokens: int = 0  # prompt tokens found in the prefix cache
    table: BlockTable | None = None  # while the request runs
    swapped: BlockTable | None = None  # table in the host's pool, while swapped out
    fills: list[int] = field(default_factory=list)  # slots filled at each return of its blocks
    num_pending: int = 0  # tokens sampled, not yet read by the host
    num_preemptions: int = 0
    number: int = 0  # place in the order of submission
    admission: int = 0  # place in the order of admission, renewed after preemption
    scheduled_at: float | None = None  # first admission
    token_times: list[float] = field(default_factory=list)
    finished_at: float | None = None
    history: list[tuple[RequestState, float]] = field(default_factory=list)  # states entered, when

    @property
    def first_token_at(self) -> float | None:
        return self.token_times[0] if self.token_times else None

    @property
    def num_tokens(self) -> int:
        """Prompt and output so far, pending tokens included."""
        return len(self.prompt) + len(self.output_tokens) + self.num_pending

    @property
    def num_computed(self) -> int:
        """Tokens whose K and V are in the cache, or will be after the steps planned so far."""
        return self.table.num_tokens if self.table is not None else 0

    @property
    def is_full(self) -> bool:
        """Whether the last token is sampled, even if not yet read."""
        return len(self.output_tokens) + self.num_pending >= self.max_tokens

    @property
    def max_slots(self) -> int:
        """Slots it can ever fill: the last token is sampled, but never written to the cache."""
        return len(self.prompt) + self.max_tokens - 1

    @property
    def need(self) -> Need:
        return Need(self.num_tokens, self.max_slots, self.prefix_ids, len(self.prompt))

    def enter(self, state: RequestState, now: float) -> None:
        self.state = state
        self.history.append((state, now))

    def tokens(self, start: int, stop: int) -> Sequence[int]:
        """Tokens ``start .. stop - 1`` of prompt and output, joined; a pending token is 0."""
        split = len(self.prompt)
        if stop <= split:
            return self.prompt[start:stop]
        output = self.output_tokens[max(0, start - split) : stop - split]
        known = [*self.prompt[start:], *output]
        return known + [0] * (stop - start - len(known))

"""A request, its states, and the time stamps that latency is computed from."""

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum

from .block_table import BlockTable, Need


class RequestState(StrEnum):
    """CortexStream's states (Pending -> Prefilling -> Decoding -> Finished / Failed), plus
    preempted and cancelled.
    """

    PENDING = "pending"
    PREFILLING = "prefilling"
    DECODING = "decoding"
    PREEMPTED = "preempted"
    FINISHED = "finished"
    FAILED = "failed"
    CANCELLED = "cancelled"


@dataclass(frozen=True, slots=True)
class TokenEvent:
    """One token of one request, or (``token`` None) its end without one. ``finish_reason`` is set
    on the last event.

    ``text``, with a tokenizer: what can be shown now; half a character, or the beginning of a stop
    string, waits. ``logprobs``, where asked for: token -> log-probability, the sampled one's first.
    """

    request_id: str
    token: int | None
    finish_reason: str | None = None
    text: str | None = None
    logprobs: Mapping[int, float] | None = None


@dataclass(eq=False, slots=True)
class Request:
    """``max_tokens`` tokens wanted behind ``prompt``. Times are seconds on the engine's clock; None
    until they are reached.
    """

    id: str
    prompt: tuple[int, ...]
    max_tokens: int
    stop_token_ids: frozenset[int] = frozenset()
    arrived_at: float = 0.0
    prefix_ids: tuple[Hashable, ...] = ()  # of the prompt's blocks, as `Need` has them
    priority: int = 0  # lower ones first
    on_token: Callable[[TokenEvent], None] | None = None  # called with each event
    stop_when: Callable[["Request"], bool] | None = None  # asked behind each token

    state: RequestState = RequestState.PENDING
    output_tokens: list[int] = field(default_factory=list)
    text: str = ""  # of the output, with a tokenizer; without the stop string that ended it
    logprobs: list[Mapping[int, float]] = field(default_factory=list)  # one an output token
    finish_reason: str | None = None
    error: str | None = None
    cached_tokens: int = 0  # prompt tokens whose K and V were found in the prefix cache
    table: BlockTable | None = None  # while the request runs
    swapped: BlockTable | None = None  # in the host's pool, while its K and V wait there
    fills: list[int] = field(default_factory=list)  # slots filled at the end of each hold of blocks
    num_pending: int = 0  # tokens sampled, but not read yet
    num_preemptions: int = 0
    number: int = 0  # place in the order of submission
    admission: int = 0  # place in the order of admission; a preempted request gets a new one
    scheduled_at: float | None = None
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
        """Tokens whose K and V are in the cache, or will be when the step under way has run."""
        return self.table.num_tokens if self.table is not None else 0

    @property
    def is_full(self) -> bool:
        """Whether the last token is sampled, if perhaps not read yet."""
        return len(self.output_tokens) + self.num_pending == self.max_tokens

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
        """Tokens ``start .. stop - 1`` of prompt and output as one list; a pending token is 0."""
        split = len(self.prompt)
        if stop <= split:
            return self.prompt[start:stop]
        output = self.output_tokens[max(0, start - split) : stop - split]
        known = [*self.prompt[start:], *output]
        return known + [0] * (stop - start - len(known))

"""A request, its states, and the time stamps that latency is computed from."""

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum


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

    With a tokenizer, ``text`` is what can be shown now: a character that is not whole yet, or what
    may become a stop string, waits for the next one. ``logprobs`` where the request asked for them:
    token -> log-probability, the sampled token's first.
    """

    request_id: str
    token: int | None
    finish_reason: str | None = None
    text: str | None = None
    logprobs: Mapping[int, float] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How a token is chosen: the arguments of mlx-lm's `make_sampler` and `make_logits_processors`.
    The default is greedy.

    ``penalty_context`` is how many of the last tokens, prompt included, the penalties look at.
    """

    temperature: float = 0.0
    top_p: float = 0.0
    min_p: float = 0.0
    min_tokens_to_keep: int = 1
    top_k: int = 0
    xtc_probability: float = 0.0
    xtc_threshold: float = 0.1
    repetition_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    penalty_context: int = 20
    logit_bias: Mapping[int, float] | None = None


@dataclass(eq=False, slots=True)
class Request:
    """``max_tokens`` tokens wanted behind ``prompt``. Times are seconds on the engine's clock;
    None: not reached yet.
    """

    id: str
    prompt: tuple[int, ...]
    max_tokens: int
    stop_token_ids: frozenset[int] = frozenset()
    arrived_at: float = 0.0
    prefix_ids: tuple[
        Hashable, ...
        # one for each block of the prompt, a partial last one included; equal ids: equal prefixes
    ] = ()
    priority: int = 0  # lower ones first
    on_token: Callable[[TokenEvent], None] | None = None  # told of each event as it comes
    stop_when: Callable[["Request"], bool] | None = None  # asked behind each token

    state: RequestState = RequestState.PENDING
    output_tokens: list[int] = field(default_factory=list)
    text: str = ""  # of the output, with a tokenizer; without the stop string that ended it
    logprobs: list[Mapping[int, float]] = field(
        default_factory=list
    )  # one for each output token, where asked for
    finish_reason: str | None = None
    error: str | None = None
    cached_tokens: int = 0  # prompt tokens whose K and V were found in the prefix cache
    num_computed: int = 0  # tokens whose K and V are in the cache
    num_pending: int = 0  # tokens sampled, but not read yet
    num_preemptions: int = 0
    number: int = 0  # place in the order of submission
    admission: int = (
        0  # place in the order of admission to the batch; a preempted request gets a new one
    )
    scheduled_at: float | None = None
    token_times: list[float] = field(default_factory=list)
    finished_at: float | None = None
    history: list[tuple[RequestState, float]] = field(
        default_factory=list
    )  # each state it has entered since, and when

    @property
    def first_token_at(self) -> float | None:
        return self.token_times[0] if self.token_times else None

    @property
    def num_tokens(self) -> int:
        """Prompt and output so far, with what is pending."""
        return len(self.prompt) + len(self.output_tokens) + self.num_pending

    @property
    def is_full(self) -> bool:
        """Whether its last token is sampled, if perhaps not read yet."""
        return len(self.output_tokens) + self.num_pending == self.max_tokens

    @property
    def max_slots(self) -> int:
        """Slots it can ever fill: its last token is sampled, but never written to the cache."""
        return len(self.prompt) + self.max_tokens - 1

    def enter(self, state: RequestState, now: float) -> None:
        self.state = state
        self.history.append((state, now))

    def restart(self, now: float) -> None:
        """It lost its blocks: all its tokens are computed again when it is admitted."""
        self.enter(RequestState.PREEMPTED, now)
        self.num_computed = 0
        self.num_preemptions += 1

    def tokens(self, start: int, stop: int) -> Sequence[int]:
        """Tokens ``start .. stop - 1`` of prompt and output taken as one list. Of a pending one 0
        is all that is known.
        """
        split = len(self.prompt)
        if stop <= split:
            return self.prompt[start:stop]
        known = [*self.prompt[start:], *self.output_tokens[max(0, start - split) : stop - split]]
        return known + [0] * (stop - start - len(known))

"""Options, each declared once: name, default, words and check. Engine, replay, parsers and sweeps
read them from here.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields
from functools import partial

from .allocators import GROWTHS, Allocator
from .errors import (
    BadInput,
    a_function,
    a_number,
    at_least,
    one_of,
    real,
    share,
    shown,
    yes_or_no,
)

OOM_POLICIES = ("wait", "fail", "preempt")
PREEMPTIONS = ("recompute", "swap")
ATTENTION_METHODS = ("auto", "views", "windows", "gather")
WATERMARK = 0.02
DEFAULT_STEP_TOKENS = 512  # of an engine
MLX_LM = "mlx-lm"  # the baseline of a bench: mlx-lm's own batching
# Of the numbers of sampling, in float32: a log-probability over a smaller temperature overflows, so
# that one is 0; a larger number is refused, for it, or what it makes of a logit, may be infinite.
COLDEST, LARGEST = 1e-30, 1e30
# What a bench compares: one of each family (fixed, contiguous, scattered, ours) and the baseline.
BENCHED = ("static", "cortexstream", "paged", "runs", MLX_LM)
BENCH_BATCH_SIZE = 8

at_least_one = partial(at_least, minimum=1)


def option(default, words: str = "", check: Callable | None = None, choices: tuple = ()):
    """A field with its help text, and a check ``(name, value)`` that is left out for None."""
    if choices:
        check = partial(one_of, allowed=choices)
    return field(default=default, metadata={"words": words, "check": check, "choices": choices})


class Checked:
    """Base of frozen dataclasses whose fields are checked when one is made: `BadInput`. A field
    holds what its check returns: a plain int for one of NumPy's.
    """

    def __post_init__(self):
        for each in fields(self):
            check, value = each.metadata.get("check"), getattr(self, each.name)
            if check is not None and not (value is None and each.default is None):
                object.__setattr__(self, each.name, check(each.name, value))


@dataclass(frozen=True, kw_only=True)
class Options(Checked):
    """What scheduler and block manager want to know."""

    num_blocks: int = option(MISSING, "blocks in the pool", at_least_one)
    block_size: int = option(16, "slots a block", at_least_one)
    strategy: str | Callable[[int], Allocator] = option(
        "paged", "name of a strategy, or a factory of your own"
    )
    growth: str | None = option(
        None, "what a sequence does that outgrows its blocks; else the strategy's", choices=GROWTHS
    )
    max_batch_size: int = option(16, "requests run at once", at_least_one)
    max_step_tokens: int | None = option(None, check=at_least_one)
    max_seq_len: int | None = option(
        None, "longest request in tokens, and the region of static", at_least_one
    )
    oom_policy: str = option("wait", "what happens when memory is out", choices=OOM_POLICIES)
    watermark: float = option(
        WATERMARK, "share of the pool that admissions leave free for growth", share
    )
    prefix_caching: bool = option(False, "share equal prefixes of prompts", yes_or_no)

    def __post_init__(self):
        super().__post_init__()
        if self.max_step_tokens is not None:
            at_least("max_step_tokens", self.max_step_tokens, self.max_batch_size)

    def step_tokens(self, default: int) -> int:
        """``max_step_tokens``, else ``default``, or the batch size where that is more."""
        if self.max_step_tokens is not None:
            return self.max_step_tokens
        return max(default, self.max_batch_size)


@dataclass(frozen=True, kw_only=True)
class EngineOptions(Options):
    """`Options` of an engine."""

    max_step_tokens: int | None = option(
        None,
        "tokens a step computes at most: longer prompts are cut into chunks (default: "
        f"{DEFAULT_STEP_TOKENS}, or the batch size where that is more)",
        at_least_one,
    )
    preemption: str = option(
        "recompute",
        "how a preempted request goes on: computed again, or swapped to the host",
        choices=PREEMPTIONS,
    )
    swap_blocks: int | None = option(
        None, "blocks of the host's pool for swapped requests (default: as the pool)", at_least_one
    )
    attention: str = option("auto", "how decode rows read K and V", choices=ATTENTION_METHODS)
    pipeline: bool | None = option(
        None, "launch a step before the last one's tokens are read", yes_or_no
    )

    def __post_init__(self):
        super().__post_init__()
        if self.swap_blocks is not None and self.preemption != "swap":
            raise BadInput("swap_blocks is for preemption 'swap'")

    @property
    def num_swap_blocks(self) -> int:
        """Blocks of the host's pool; 0 without one."""
        if self.preemption != "swap":
            return 0
        return self.num_blocks if self.swap_blocks is None else self.swap_blocks


@dataclass(frozen=True, kw_only=True)
class ReplayOptions(Options):
    """`Options` of a replay. ``prefix_caching`` shares prompt blocks by the workload's prefix ids:
    ``block_size`` must then be theirs or a multiple.
    """

    max_batch_size: int = option(256, "requests run at once", at_least_one)
    max_seq_len: int | None = option(
        None, "region of static, in tokens (default: the longest request, as a power of two)",
        at_least_one,
    )  # fmt: skip


def _from_to(low: float, high: float) -> Callable:
    return partial(a_number, low=low, high=high)


_FINITE = _from_to(-LARGEST, LARGEST)


@dataclass(frozen=True, kw_only=True)
class SamplingParams(Checked):
    """How a token is chosen: the arguments of mlx-lm's `make_sampler` and
    `make_logits_processors`. The default is greedy.

    ``penalty_context``: tokens that the penalties look at, the last ones of prompt and output.
    ``logit_bias``: token -> what is added to its logit; ``-inf`` bans it. A temperature below
    `COLDEST` is 0.
    """

    temperature: float = option(0.0, check=_from_to(0, LARGEST))
    top_p: float = option(0.0, check=_from_to(0, 1))
    min_p: float = option(0.0, check=_from_to(0, 1))
    min_tokens_to_keep: int = option(1, check=at_least_one)
    top_k: int = option(0, check=partial(at_least, minimum=0))
    xtc_probability: float = option(0.0, check=_from_to(0, 1))
    xtc_threshold: float = option(0.1, check=_from_to(0, 0.5))
    repetition_penalty: float | None = option(None, check=_from_to(COLDEST, LARGEST))
    presence_penalty: float | None = option(None, check=_FINITE)
    frequency_penalty: float | None = option(None, check=_FINITE)
    penalty_context: int = option(20, check=at_least_one)
    logit_bias: Mapping[int, float] | None = None

    def __post_init__(self):
        super().__post_init__()
        if self.temperature < COLDEST:
            object.__setattr__(self, "temperature", 0.0)
        biases = self.logit_bias
        if biases is not None and not isinstance(biases, Mapping):
            raise BadInput(f"logit_bias must be a dict of token -> number, not {shown(biases)}")
        plain = {}
        for token, bias in (biases or {}).items():
            token = at_least("token of logit_bias", token, 0)
            plain[token] = real(bias)
            if not plain[token] <= LARGEST:
                raise BadInput(
                    f"logit_bias of token {token} must be a number of at most {LARGEST:g} "
                    f"(-inf bans it), not {shown(bias)}"
                )
        object.__setattr__(self, "logit_bias", plain or None)

    @classmethod
    def of(cls, given: "SamplingParams | Mapping | None") -> "SamplingParams":
        """Parameters as they are, or from a dict of fields; None: the default."""
        if isinstance(given, cls):
            return given
        if given is not None and not isinstance(given, Mapping):
            raise BadInput(
                "sampling must be a SamplingParams, a dict of its fields or a sampler, not "
                f"{shown(given)}"
            )
        known = {each.name for each in fields(cls)}
        if unknown := [name for name in given or () if name not in known]:
            raise BadInput(
                f"sampling has {shown(unknown[0])}, but knows only {', '.join(sorted(known))}"
            )
        return cls(**(given or {}))


@dataclass(frozen=True, kw_only=True)
class RequestOptions(Checked):
    """What `Engine.submit` takes besides prompt, length, name and time of a request.

    - ``sampling``: `SamplingParams`, a dict of its fields, or a sampler of mlx-lm's kind;
      ``logits_processors`` likewise. Greedy by default. ``seed``: the same seed, the same tokens,
      in any batch.
    - A request ends with one of ``stop_token_ids`` (and, with a tokenizer, of its end-of-sequence
      tokens unless ``ignore_eos``), before the text of ``stop`` (one or several strings; needs a
      tokenizer), or where ``stop``, a function, says so of the request.
    - ``logprobs``: tell each token's log-probability, and those of this many best ones.
    - ``priority``: lower ones first. ``timeout_s``: seconds after its arrival at which a request
      ends, by the next step. ``messages``: dicts of role and content, in place of a prompt, for
      the tokenizer's chat template.
    - ``on_token`` is called with each event. An exception in a function of the caller's own ends
      this request, and no other.
    """

    sampling: SamplingParams | Mapping | Callable | None = None
    logits_processors: Sequence[Callable] = ()
    seed: int | None = None
    stop_token_ids: Sequence[int] = ()
    stop: str | Sequence[str] | Callable = ()
    ignore_eos: bool = option(False, check=yes_or_no)
    logprobs: int | None = None
    priority: int = option(0, check=partial(at_least, minimum=-(2**31)))
    timeout_s: float | None = option(None, check=_from_to(0, LARGEST))
    messages: Sequence[Mapping] | None = None
    on_token: Callable | None = option(None, check=a_function)

    def __post_init__(self):
        super().__post_init__()
        for name in ("logits_processors", "stop_token_ids", "stop"):
            if getattr(self, name) is None:
                object.__setattr__(self, name, ())


def as_option(name: str) -> str:
    """A parameter's name as the command line spells it."""
    return f"--{name.replace('_', '-')}"

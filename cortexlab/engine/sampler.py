"""From logits to a token: mlx-lm's samplers and logits processors, one random state a request."""

import math
import secrets
from collections.abc import Callable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, fields

import mlx.core as mx
from mlx_lm.sample_utils import make_logits_processors, make_sampler

from ..errors import BadInput, at_least, shown
from ..scheduler.request import SamplingParams

Sampler = Callable[[mx.array], mx.array]
LogitsProcessor = Callable[[mx.array, mx.array], mx.array]
PENALTIES = ("repetition", "presence", "frequency")
MAX_SEED = 2**63 - 1


class Chooser:
    """How one request's tokens are chosen: processors, then a sampler, under a random state of the
    request's own.

    With the same ``seed`` a request is given the tokens that `mlx_lm.generate.generate_step` gives
    behind ``mx.random.seed(seed)``, whatever else is in its batch. ``sampling`` may be a sampler of
    mlx-lm's kind: log-probabilities ``[1, vocabulary]`` to a token ``[1]``. ``num_logprobs``: how
    many of the best are told beside the sampled one; None: none at all.
    """

    def __init__(
        self,
        sampling: SamplingParams | Mapping | Sampler | None,
        processors: Sequence[LogitsProcessor],
        seed: int | None,
        num_logprobs: int | None,
        vocabulary: int,
    ):
        self.foreign = callable(sampling) or bool(
            processors
        )  # code of the user's own: what it does is its request's affair alone
        self._vocabulary = vocabulary
        self.num_logprobs = num_logprobs
        if num_logprobs is not None:
            at_least("logprobs", num_logprobs, 0, vocabulary - 1)
        if any(not callable(processor) for processor in processors):
            raise BadInput(
                f"logits_processors must be functions of (tokens, logits), not {shown(processors)}"
            )
        params = SamplingParams() if callable(sampling) else checked(sampling, vocabulary)
        self._sampler = sampling if callable(sampling) else _sampler(params)
        self._processors = [*_processors(params), *processors]
        self.greedy = not callable(sampling) and params.temperature == 0
        self.plain = (
            self.greedy and not self._processors and num_logprobs is None
        )  # nothing but the largest logit
        self.wants_tokens = bool(self._processors)
        seed = secrets.randbelow(MAX_SEED) if seed is None else at_least("seed", seed, 0, MAX_SEED)
        self.state = None if self.greedy else mx.random.key(seed)

    def __call__(
        self, tokens: mx.array | None, logits: mx.array, state: mx.array | None
    ) -> "Choice":
        """Behind ``tokens`` (prompt and output; None unless it ``wants_tokens``), from logits ``[1,
        vocabulary]``. Lazy.

        A sampler or processor of the user's own is computed at once; `BadInput` says what is wrong
        with what it returned. ``state`` is where the random state stands: this chooser's, once the
        token before is delivered, else that one's `Choice.state`.
        """
        shape = logits.shape
        for processor in self._processors:
            logits = processor(tokens, logits)
            if not isinstance(logits, mx.array) or logits.shape != shape:
                raise BadInput(
                    f"its logits processor must return logits {list(shape)}, not {_kind(logits)}"
                )
        logprobs = logits - mx.logsumexp(logits, keepdims=True)
        if self.greedy:
            token = self._sampler(logprobs)
        else:
            with random_state(state) as after:
                token = self._sampler(logprobs)
            (state,) = after
        if self.foreign:
            self._check(token)
        token = token.reshape(1).astype(mx.uint32)
        if self.num_logprobs is None:
            return Choice(token, state, [])
        best = mx.argsort(-logprobs[0])[: self.num_logprobs]
        named = mx.concatenate([token.astype(best.dtype), best])
        return Choice(token, state, [named, logprobs[0, named]])

    def _check(self, token) -> None:
        """Compute it now: what raises here is its own affair, and no other token than the model
        knows may reach the next step.
        """
        if (
            not isinstance(token, mx.array)
            or token.size != 1
            or not mx.issubdtype(token.dtype, mx.integer)
        ):
            raise BadInput(f"its sampler must return one token id, not {_kind(token)}")
        if not 0 <= token.item() < self._vocabulary:
            raise BadInput(
                f"its sampler returned token {token.item()}, but tokens go from 0 to "
                f"{self._vocabulary - 1}"
            )


class Choice:
    """A token that is sampled, but perhaps not computed yet: ``[1]``, the random state behind it,
    and the log-probabilities wanted.
    """

    def __init__(self, token: mx.array, state: mx.array | None, named: list[mx.array]):
        self.token, self.state, self._named = token, state, named

    def arrays(self) -> list[mx.array]:
        return [self.token, *self._named, *([self.state] if self.state is not None else [])]

    def logprobs(self) -> dict[int, float] | None:
        """Token -> log-probability, the sampled one's first."""
        if not self._named:
            return None
        tokens, values = (array.tolist() for array in self._named)
        return dict(zip(tokens, values, strict=True))


@contextmanager
def random_state(state: mx.array):
    """Within it MLX draws from ``state``; the list it yields holds the state behind that
    afterwards. MLX's own is as it was.
    """
    current = mx.random.state[
        0
    ]  # the array itself: assigning to its elements is what sets the state
    before, after = mx.array(current), []
    current[...] = state
    try:
        yield after
    finally:
        after.append(mx.array(mx.random.state[0]))
        mx.random.state[0][...] = before


def _kind(value: object) -> str:
    """What something returned is, in a few words."""
    return (
        f"an array {list(value.shape)} of {value.dtype}"
        if isinstance(value, mx.array)
        else shown(value)
    )


def checked(sampling: SamplingParams | Mapping | None, vocabulary: int) -> SamplingParams:
    """`BadInput` naming the first value that makes no sense."""
    if sampling is None:
        return SamplingParams()
    if isinstance(sampling, Mapping):
        known = {each.name for each in fields(SamplingParams)}
        if unknown := [name for name in sampling if name not in known]:
            raise BadInput(
                f"sampling has {shown(unknown[0])}, but knows only {', '.join(sorted(known))}"
            )
        sampling = SamplingParams(**sampling)
    if not isinstance(sampling, SamplingParams):
        raise BadInput(
            "sampling must be a SamplingParams, a dict of its fields or a sampler, not "
            f"{shown(sampling)}"
        )
    for name, low, high in (
        ("temperature", 0, math.inf),
        ("top_p", 0, 1),
        ("min_p", 0, 1),
        ("xtc_probability", 0, 1),
        ("xtc_threshold", 0, 0.5),
        ("repetition_penalty", 0, math.inf),
        ("presence_penalty", -math.inf, math.inf),
        ("frequency_penalty", -math.inf, math.inf),
    ):
        value = getattr(sampling, name)
        if value is None and name.endswith("penalty"):
            continue
        if (
            isinstance(value, bool)
            or not isinstance(value, int | float)
            or not low <= value <= high
            or not math.isfinite(value)
        ):
            raise BadInput(f"{name} must be a number from {low} to {high}, not {shown(value)}")
    if sampling.repetition_penalty == 0:
        raise BadInput("repetition_penalty must be above 0: it divides")
    at_least("top_k", sampling.top_k, 0, vocabulary - 1)
    at_least("min_tokens_to_keep", sampling.min_tokens_to_keep, 1, vocabulary)
    at_least("penalty_context", sampling.penalty_context, 1)
    if sampling.logit_bias is not None and not isinstance(sampling.logit_bias, Mapping):
        raise BadInput(
            f"logit_bias must be a dict of token -> number, not {shown(sampling.logit_bias)}"
        )
    for token, bias in (sampling.logit_bias or {}).items():
        at_least("token of logit_bias", token, 0, vocabulary - 1)
        if isinstance(bias, bool) or not isinstance(bias, int | float) or math.isnan(bias):
            raise BadInput(f"logit_bias of token {token} must be a number, not {shown(bias)}")
    return sampling


def _sampler(params: SamplingParams) -> Sampler:
    return make_sampler(
        params.temperature,
        params.top_p,
        params.min_p,
        params.min_tokens_to_keep,
        params.top_k,
        params.xtc_probability,
        params.xtc_threshold,
    )


def _processors(params: SamplingParams) -> list[LogitsProcessor]:
    given = asdict(params)
    options = {f"{name}_penalty": given[f"{name}_penalty"] for name in PENALTIES}
    options |= {f"{name}_context_size": params.penalty_context for name in PENALTIES}
    return make_logits_processors(dict(params.logit_bias) if params.logit_bias else None, **options)

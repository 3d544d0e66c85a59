"""From logits to a token: mlx-lm's samplers and logits processors, one random state a request."""

import secrets
from collections.abc import Callable, Mapping, Sequence
from contextlib import contextmanager

import mlx.core as mx
from mlx_lm.sample_utils import make_logits_processors, make_sampler

from ..errors import BadInput, at_least, shown
from ..options import SamplingParams

Sampler = Callable[[mx.array], mx.array]
LogitsProcessor = Callable[[mx.array, mx.array], mx.array]
MAX_SEED = 2**63 - 1
COLD_IN_16_BIT = 1e-3  # below it, a log-probability over the temperature may overflow float16


class Chooser:
    """How one request's tokens are chosen: processors, then a sampler, under its own random state.

    With ``seed`` the tokens are those of `mlx_lm.generate.generate_step` after
    ``mx.random.seed(seed)``, in any batch. ``sampling`` may be a sampler of mlx-lm's kind:
    log-probabilities ``[1, vocabulary]`` to a token ``[1]``. ``num_logprobs``: best ones to tell
    beside the sampled one; None: none at all.
    """

    def __init__(
        self,
        sampling: SamplingParams | Mapping | Sampler | None,
        processors: Sequence[LogitsProcessor],
        seed: int | None,
        num_logprobs: int | None,
        vocabulary: int,
    ):
        own_sampler = callable(sampling)
        if num_logprobs is not None:
            num_logprobs = at_least("logprobs", num_logprobs, 0, vocabulary - 1)
        if any(not callable(processor) for processor in processors):
            raise BadInput(
                f"logits_processors must be functions of (tokens, logits), not {shown(processors)}"
            )
        params = SamplingParams() if own_sampler else checked(sampling, vocabulary)
        self._sampler = sampling if own_sampler else _sampler(params)
        self._processors = [*_processors(params), *processors]
        self._vocabulary = vocabulary
        self._num_logprobs = num_logprobs
        # A user's code is run at once: an exception in it ends its request alone.
        self._foreign = own_sampler or bool(processors)
        self.greedy = not own_sampler and params.temperature == 0
        self._cold = not own_sampler and 0 < params.temperature < COLD_IN_16_BIT
        self.wants_tokens = bool(self._processors)
        # Plain: nothing but the largest logit.
        self.plain = self.greedy and not self._processors and num_logprobs is None
        seed = secrets.randbelow(MAX_SEED) if seed is None else at_least("seed", seed, 0, MAX_SEED)
        self.state = None if self.greedy else mx.random.key(seed)

    def __call__(
        self, tokens: mx.array | None, logits: mx.array, state: mx.array | None
    ) -> "Choice":
        """Choose after ``tokens`` (prompt and output; None unless it ``wants_tokens``), from
        logits ``[1, vocabulary]``. Lazy, but for functions of the user's own; `BadInput` for what
        they return. ``state``: random key before this token, of the token in flight if there is
        one, else the stored one.
        """
        shape = logits.shape
        for processor in self._processors:
            logits = processor(tokens, logits)
            is_like = isinstance(logits, mx.array) and logits.shape == shape
            if not is_like or not mx.issubdtype(logits.dtype, mx.floating):
                raise BadInput(
                    f"its logits processor must return logits {list(shape)}, not {_kind(logits)}"
                )
        total = mx.logsumexp(logits, keepdims=True)
        logprobs = logits - total
        if self._cold:
            logprobs = logprobs.astype(mx.float32)
        if self.greedy:
            token = self._sampler(logprobs)
        else:
            with random_state(state) as after:
                token = self._sampler(logprobs)
            (state,) = after
        if self._foreign:
            self._check(token)
        token = token.reshape(1).astype(mx.uint32)
        if self._num_logprobs is None:
            return Choice(token, state, mx.isfinite(total), [])
        best = mx.argsort(-logprobs[0])[: self._num_logprobs]
        named = mx.concatenate([token.astype(best.dtype), best])
        return Choice(token, state, mx.isfinite(total), [named, logprobs[0, named]])

    def _check(self, token) -> None:
        """`BadInput` unless a sampler of the user's own returned a token of the vocabulary."""
        is_array = isinstance(token, mx.array) and token.size == 1
        if not is_array or not mx.issubdtype(token.dtype, mx.integer):
            raise BadInput(f"its sampler must return one token id, not {_kind(token)}")
        if not 0 <= token.item() < self._vocabulary:
            raise BadInput(
                f"its sampler returned token {token.item()}, but tokens go from 0 to "
                f"{self._vocabulary - 1}"
            )


class Choice:
    """A sampled token ``[1]``, perhaps not computed yet, the random state after it, whether its
    logits were ``finite`` (none NaN or +inf, and not all -inf), and the log-probabilities wanted.
    """

    def __init__(self, token, state: mx.array | None, finite: mx.array, named: list[mx.array]):
        self.token, self.state, self.finite, self._named = token, state, finite, named

    def arrays(self) -> list[mx.array]:
        state = [] if self.state is None else [self.state]
        return [self.token, self.finite, *self._named, *state]

    def logprobs(self) -> dict[int, float] | None:
        """Token -> log-probability, the sampled one's first."""
        if not self._named:
            return None
        tokens, values = (array.tolist() for array in self._named)
        return dict(zip(tokens, values, strict=True))


@contextmanager
def random_state(state: mx.array):
    """Within it MLX draws from ``state``; at its end, the list it yields holds the next
    state. MLX's own state is restored.
    """
    current = mx.random.state[0]  # assigning to the array's elements is what sets the state
    before, after = mx.array(current), []
    current[...] = state
    try:
        yield after
    finally:
        after.append(mx.array(mx.random.state[0]))
        mx.random.state[0][...] = before


def _kind(value: object) -> str:
    """What something returned is, in a few words."""
    if isinstance(value, mx.array):
        return f"an array {list(value.shape)} of {value.dtype}"
    return shown(value)


def checked(sampling: SamplingParams | Mapping | None, vocabulary: int) -> SamplingParams:
    """`BadInput` naming the first value that makes no sense for this vocabulary."""
    params = SamplingParams.of(sampling)
    at_least("top_k", params.top_k, 0, vocabulary - 1)
    at_least("min_tokens_to_keep", params.min_tokens_to_keep, 1, vocabulary)
    for token in params.logit_bias or ():
        at_least("token of logit_bias", token, 0, vocabulary - 1)
    return params


def _sampler(params: SamplingParams) -> Sampler:
    return make_sampler(
        temp=params.temperature,
        top_p=params.top_p,
        min_p=params.min_p,
        min_tokens_to_keep=params.min_tokens_to_keep,
        top_k=params.top_k,
        xtc_probability=params.xtc_probability,
        xtc_threshold=params.xtc_threshold,
    )


def _processors(params: SamplingParams) -> list[LogitsProcessor]:
    options = {}
    for name in ("repetition", "presence", "frequency"):
        options[f"{name}_penalty"] = getattr(params, f"{name}_penalty")
        options[f"{name}_context_size"] = params.penalty_context
    return make_logits_processors(dict(params.logit_bias) if params.logit_bias else None, **options)

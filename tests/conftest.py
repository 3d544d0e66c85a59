"""Shared pieces: the real models, loaded once, and the ground truth they are held to."""

from collections import defaultdict  # noqa: I001

import cortexlab  # noqa: F401 - first, so that the optimized BLAS is in place before MLX
import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.generate import generate_step
from mlx_lm.sample_utils import make_sampler

from cortexlab.engine.arena import Arena
from cortexlab.engine.attention import Plan
from cortexlab.host.models import load_model

NEAR_TIE = 1e-3  # float32: interface.md, "Equality with a reference"
NEAR_TIE_OF_SUMS = (
    1e-4  # of cumulated probabilities, whose error is at most that of the log-probabilities
)


@pytest.fixture(scope="session")
def tiny():
    return load_model("tiny")[0]


@pytest.fixture(scope="session")
def smollm2():
    return load_model("smollm2")


class Reference:
    """`mlx_lm.generate.generate_step`, one sequence at a time: each token with those that rounding
    could have put in its place.
    """

    def __init__(self, model):
        self.model = model
        self.seeds: dict = {}  # of requests that are sampled
        self._known: dict[tuple, list[tuple[int, set[int]]]] = {}

    def steps(self, prompt, max_tokens):
        key = (tuple(prompt), max_tokens)
        if key not in self._known:
            self._known[key] = [
                (int(token), near(logprobs.max() - logprobs, NEAR_TIE))
                for token, logprobs in generate_step(
                    mx.array(list(prompt)), self.model, max_tokens=max_tokens
                )
            ]
        return self._known[key]

    def sampled(self, prompt, max_tokens, seed, temperature):
        """The same behind ``mx.random.seed(seed)``.

        MLX draws u from [0, 1) and takes the token in whose part of the cumulated weights it lies
        (`mx.random.categorical` of one row). A tie is a part that is missed by no more than those
        sums can be off. That u is told rightly is asserted: the token drawn has it.
        """
        key = (tuple(prompt), max_tokens, seed, temperature)
        if key not in self._known:
            ties, draw = [], make_sampler(temperature)

            def sampler(logprobs):
                u = mx.random.uniform(shape=(1,), key=mx.random.split(mx.random.state[0])[1]).item()
                token = draw(logprobs)
                weights = mx.exp((logprobs[0] - logprobs.max()) * (1 / temperature))
                starts, total = np.array(mx.cumsum(weights, inclusive=False)), weights.sum().item()
                missed = np.maximum(
                    np.maximum(starts / total - u, u - np.append(starts[1:], np.inf) / total), 0
                )
                assert missed[token.item()] <= NEAR_TIE_OF_SUMS / 100, (
                    "this MLX draws in another way"
                )
                ties.append(near(missed, NEAR_TIE_OF_SUMS))
                return token

            before = mx.array(mx.random.state[0])
            mx.random.seed(seed)
            tokens = [
                int(token)
                for token, _ in generate_step(
                    mx.array(list(prompt)), self.model, max_tokens=max_tokens, sampler=sampler
                )
            ]
            mx.random.state[0][...] = before
            self._known[key] = list(
                zip(tokens, ties, strict=False)
            )  # one more is drawn than yielded
        return self._known[key]

    def check(self, request) -> bool:
        """True when identical, False when it parts at a near tie; anything else is an
        AssertionError.
        """
        return self._agree(request, self.steps(request.prompt, request.max_tokens))

    def check_any(self, request, temperature) -> bool:
        """The same of one that may have been cancelled, and may have been sampled by its seed in
        ``seeds``.
        """
        seed = self.seeds.get(request)
        known = self.steps(request.prompt, request.max_tokens) if seed is None else self.sampled(
            request.prompt, request.max_tokens, seed, temperature
        )  # fmt: skip
        return self._agree(
            request,
            known[: len(request.output_tokens)] if request.finish_reason == "cancelled" else known,
        )

    def _agree(self, request, expected) -> bool:
        assert len(request.output_tokens) == len(expected), (
            f"{request.id} ended after {len(request.output_tokens)} tokens"
        )
        for position, (token, (wanted, ties)) in enumerate(
            zip(request.output_tokens, expected, strict=True)
        ):
            if token != wanted:
                assert token in ties, (
                    f"{request.id}: token {position} is {token}, not {wanted}, and no tie "
                    f"({sorted(ties)})"
                )
                return False
        return True


def near(distances, limit: float) -> set[int]:
    """The tokens that are no further off than ``limit``."""
    return set(np.flatnonzero(np.array(distances) <= limit).tolist())


@pytest.fixture(scope="session")
def tiny_reference(tiny):
    return Reference(tiny)


@pytest.fixture(scope="session")
def smollm2_reference(smollm2):
    return Reference(smollm2[0])


@pytest.fixture
def ways(monkeypatch) -> dict[Arena, set[str]]:
    """By which ways the sequences of all steps on an arena were read."""
    seen, make = defaultdict(set), Plan.__init__

    def noted(plan, *args):
        make(plan, *args)
        seen[plan.arena].update(plan.ways)

    monkeypatch.setattr(Plan, "__init__", noted)
    return seen


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def prompts_of(lengths, vocabulary: int, seed: int = 0) -> list[list[int]]:
    rng = np.random.default_rng(seed)
    return [rng.integers(vocabulary, size=int(length)).tolist() for length in lengths]

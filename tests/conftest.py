"""Shared pieces: the real models, loaded once, and the ground truth they are held to."""

import cortexlab  # noqa: F401, I001 - first, so that the optimized BLAS is in place before MLX
import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.generate import generate_step
from mlx_lm.sample_utils import make_sampler

from cortexlab.model import load_model

NEAR_TIE = 1e-3  # float32: interface.md, "Equality with a reference"


@pytest.fixture(scope="session")
def tiny():
    return load_model("tiny")[0]


@pytest.fixture(scope="session")
def smollm2():
    return load_model("smollm2")


class Reference:
    """`mlx_lm.generate.generate_step`, one sequence at a time, with the gap of its two best logits at every token."""

    def __init__(self, model):
        self.model = model
        self.seeds: dict = {}  # of requests that are sampled
        self._known: dict[tuple, list[tuple[int, float]]] = {}

    def steps(self, prompt, max_tokens):
        key = (tuple(prompt), max_tokens)
        if key not in self._known:
            found = []
            for token, logprobs in generate_step(mx.array(list(prompt)), self.model, max_tokens=max_tokens):
                low, high = sorted(mx.topk(logprobs, 2).tolist())
                found.append((int(token), high - low))
            self._known[key] = found
        return self._known[key]

    def sampled(self, prompt, max_tokens, seed, temperature):
        """The same behind ``mx.random.seed(seed)``; the gap is that of the two best once the noise is added that the draw adds."""
        key = (tuple(prompt), max_tokens, seed, temperature)
        if key not in self._known:
            gaps, draw = [], make_sampler(temperature)

            def sampler(logprobs):
                noise = mx.random.gumbel(logprobs.shape, key=mx.random.split(mx.random.state[0])[1])
                low, high = sorted(mx.topk((logprobs / temperature + noise)[0], 2).tolist())
                gaps.append(high - low)
                return draw(logprobs)

            before = mx.array(mx.random.state[0])
            mx.random.seed(seed)
            tokens = [int(token) for token, _ in generate_step(mx.array(list(prompt)), self.model, max_tokens=max_tokens, sampler=sampler)]
            mx.random.state[0][...] = before
            self._known[key] = list(zip(tokens, gaps, strict=False))
        return self._known[key]

    def check(self, request) -> bool:
        """True when identical, False when it parts at a near tie; anything else is an AssertionError."""
        return self._agree(request, self.steps(request.prompt, request.max_tokens))

    def check_any(self, request, temperature) -> bool:
        """The same of one that may have been cancelled, and may have been sampled by its seed in ``seeds``."""
        seed = self.seeds.get(request)
        known = self.steps(request.prompt, request.max_tokens) if seed is None else self.sampled(
            request.prompt, request.max_tokens, seed, temperature
        )  # fmt: skip
        return self._agree(request, known[: len(request.output_tokens)] if request.finish_reason == "cancelled" else known)

    def _agree(self, request, expected) -> bool:
        assert len(request.output_tokens) == len(expected), f"{request.id} ended after {len(request.output_tokens)} tokens"
        for position, (token, (wanted, gap)) in enumerate(zip(request.output_tokens, expected, strict=True)):
            if token != wanted:
                assert gap <= NEAR_TIE, f"{request.id}: token {position} is {token}, not {wanted}, and no tie (gap {gap:.4f})"
                return False
        return True


@pytest.fixture(scope="session")
def tiny_reference(tiny):
    return Reference(tiny)


@pytest.fixture(scope="session")
def smollm2_reference(smollm2):
    return Reference(smollm2[0])


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def prompts_of(lengths, vocabulary: int, seed: int = 0) -> list[list[int]]:
    rng = np.random.default_rng(seed)
    return [rng.integers(vocabulary, size=int(length)).tolist() for length in lengths]

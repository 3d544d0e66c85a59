"""Shared pieces: the real models, loaded once, and the ground truth they are held to."""

import cortexlab  # noqa: F401, I001 - first, so that the optimized BLAS is in place before MLX
import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.generate import generate_step

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

    def check(self, request) -> bool:
        """True when identical, False when it parts at a near tie; anything else is an AssertionError."""
        expected = self.steps(request.prompt, request.max_tokens)
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

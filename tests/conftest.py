"""Fixtures of the tests: the models, mlx-lm's own tokens as the reference, and the marker `cpu`."""

import json  # noqa: I001
import os
from collections import defaultdict
from pathlib import Path

import cortexlab  # noqa: F401 - first, so that the optimized BLAS is in place before MLX
import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.generate import generate_step
from mlx_lm.sample_utils import make_sampler
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from cortexlab.engine.arena import Arena
from cortexlab.engine.attention import Plan
from cortexlab.host.models import load_model
from cortexlab.workloads.synthetic import WorkItem
from cortexlab.workloads.traces import KNOWN, load_trace

NEAR_TIE = 1e-3  # largest gap of two logits in float32 that a reference may decide otherwise
NEAR_TIE_OF_SUMS = 1e-4  # largest gap of two cumulated probabilities
TRACES = Path(__file__).parents[2] / "shared" / "traces"  # real ones, where they are
if TRACES.is_dir():
    os.environ.setdefault("CORTEXLAB_TRACES", str(TRACES))


def pytest_collection_modifyitems(items):
    """Skip the tests marked ``cpu`` when MLX's default device is not the CPU."""
    if mx.default_device() != mx.cpu:
        skip = pytest.mark.skip(reason="holds on MLX's CPU device only: the test says why")
        for item in items:
            if item.get_closest_marker("cpu"):
                item.add_marker(skip)


@pytest.fixture(scope="session")
def tiny():
    return load_model("tiny")[0]


@pytest.fixture(scope="session")
def smollm2():
    return load_model("smollm2")


class Reference:
    """Tokens of `mlx_lm.generate.generate_step`, one sequence at a time; each with its near ties,
    the tokens that rounding could put in its place.
    """

    def __init__(self, model):
        self.model = model
        self.seeds: dict = {}  # request -> its seed, None for a greedy request
        self._known: dict[tuple, list[tuple[int, set[int]]]] = {}

    def steps(self, prompt, max_tokens):
        """``(token, near ties)`` for each greedy token after ``prompt``."""
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
        """``(token, near ties)`` for each token sampled after ``mx.random.seed(seed)``.

        `mx.random.categorical` draws u from [0, 1) and takes the token whose interval of cumulated
        probabilities contains u. A near tie is a token whose interval misses u by no more than the
        rounding error of the cumulated sums. The interval of MLX's own token must contain u.
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
                    "this version of MLX samples in another way"
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
            # `generate_step` draws one token more than it yields.
            self._known[key] = list(zip(tokens, ties, strict=False))
        return self._known[key]

    def check(self, request) -> bool:
        """Compare a greedy request: True if its tokens are the reference's, False if they part at a
        near tie; any other difference is an AssertionError.
        """
        return self._agree(request, self.steps(request.prompt, request.max_tokens))

    def check_any(self, request, temperature) -> bool:
        """Compare a request as `check` does; it may be cancelled, or sampled by its seed in
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
                    f"{request.id}: token {position} is {token}, not {wanted}, and not among the "
                    f"near ties {sorted(ties)}"
                )
                return False
        return True


def near(distances, limit: float) -> set[int]:
    """Token ids whose distance is at most ``limit``."""
    return set(np.flatnonzero(np.array(distances) <= limit).tolist())


@pytest.fixture(scope="session")
def tiny_reference(tiny):
    return Reference(tiny)


@pytest.fixture(scope="session")
def smollm2_reference(smollm2):
    return Reference(smollm2[0])


@pytest.fixture
def ways(monkeypatch) -> dict[Arena, set[str]]:
    """Attention methods (`Plan.ways`) used by all steps on each arena."""
    seen, make = defaultdict(set), Plan.__init__

    def noted(plan, *args):
        make(plan, *args)
        seen[plan.arena].update(plan.ways)

    monkeypatch.setattr(Plan, "__init__", noted)
    return seen


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def real_trace(name: str) -> list[WorkItem]:
    """Requests of a real trace; skips the test where its file is not here."""
    folder, file = os.environ.get("CORTEXLAB_TRACES"), KNOWN[name][0]
    if not folder or not Path(folder, file).is_file():
        pytest.skip(f"no {file} in $CORTEXLAB_TRACES ({folder})")
    return load_trace(name)


def address(array: mx.array) -> int:
    """Address of an array's data."""
    mx.eval(array)
    return np.array(array, copy=False).__array_interface__["data"][0]


def prompts_of(lengths, vocabulary: int, seed: int = 0) -> list[list[int]]:
    """One random prompt for each length."""
    rng = np.random.default_rng(seed)
    return [rng.integers(vocabulary, size=int(length)).tolist() for length in lengths]


def strict(text: str):
    """Parse JSON without the extensions NaN and Infinity, which other readers refuse."""

    def refuse(name):
        raise AssertionError(f"{name} is no JSON")

    return json.loads(text, parse_constant=refuse)


def byte_level(template=None) -> PreTrainedTokenizerFast:
    """Letters, and a BOS token that it puts before every text by itself."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())[:254]
    vocabulary = {"<s>": 0, "</s>": 1} | {letter: i + 2 for i, letter in enumerate(letters)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<s>", "</s>"])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 0)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", chat_template=template
    )

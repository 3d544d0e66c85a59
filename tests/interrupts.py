"""Exceptions at any line of the package while an engine runs, and what must hold afterwards. Used
by `test_interrupts.py` and `soak_interrupts.py`.
"""

import sys
from collections import Counter
from itertools import count
from pathlib import Path

import mlx.core as mx
from conftest import byte_level, prompts_of
from mlx_lm.generate import generate_step

import cortexlab as cl

PACKAGE = str(Path(cl.__file__).parent)
LENGTHS, MAX_TOKENS = (40, 20, 7), 5
TIGHT = {"num_blocks": 67, "block_size": 1, "watermark": 0.0, "oom_policy": "preempt"}
MODES = {
    "plain": {"num_blocks": 64},
    "prefix cache, pipelined": {"num_blocks": 64, "prefix_caching": True, "pipeline": True},
    "swap": TIGHT | {"preemption": "swap"},  # both preempt twice in each run
    "preempt": TIGHT | {"prefix_caching": True},
    "ends": {"num_blocks": 64, "tokenizer": byte_level(), "prefix_caching": True},
}


class Interrupt(BaseException):
    """What a signal handler may raise."""


class Interrupter:
    """Raises `Interrupt` once, at the start of the package's line number ``at`` to be executed."""

    def __init__(self, at: int):
        self.left = at

    def __enter__(self):
        sys.settrace(self._called)
        return self

    def __exit__(self, *_):
        sys.settrace(None)

    def _called(self, frame, event, _):
        return self._line if frame.f_code.co_filename.startswith(PACKAGE) else None

    def _line(self, frame, event, _):
        if event == "line":
            self.left -= 1
            if self.left == 0:
                raise Interrupt(f"{frame.f_code.co_filename}:{frame.f_lineno}")
        return self._line


def submit(engine: cl.Engine, mode: str, told: list) -> list[cl.Request]:
    """Submit the requests of a mode; what their consumers are told goes to ``told``. In the mode
    "ends" they end in all ways, and the fourth draws its tokens.
    """
    prompts = prompts_of(LENGTHS, 256)
    if mode != "ends":
        return [engine.submit(prompt, MAX_TOKENS, on_token=told.append) for prompt in prompts]

    def cancelling(event):
        told.append(event)
        if len(first.output_tokens) == 2:
            engine.cancel(victim.id)

    def failing(request):
        return 1 / 0 if len(request.output_tokens) == 2 else False

    more = {"on_token": told.append, "ignore_eos": True}
    first = engine.submit(prompts[0], MAX_TOKENS, **more | {"on_token": cancelling})
    drawn = {"sampling": {"temperature": 0.8}, "seed": 3, "logprobs": 2}
    victim = engine.submit(prompts[2], 30, **more)
    return [
        first,
        engine.submit(prompts[1], MAX_TOKENS, stop=failing, **more),
        victim,
        engine.submit(prompts[2], MAX_TOKENS, **drawn, **more),
        engine.submit(prompts[1], 30, timeout_s=12, **more),
    ]


REASONS = {"ends": ["length", "error", "cancelled", "length", "timeout"]}


def engine_for(model, mode: str) -> cl.Engine:
    """An engine whose clock advances by one with each look at it."""
    return cl.Engine(model, clock=count().__next__, **MODES[mode])


def interrupted_run(model, mode: str, right: list, at: int, again: int | None = None) -> bool:
    """Run the requests of a mode, interrupt them at line ``at`` and, going on, at line ``again``;
    assert that nothing is lost, told twice or wrong. ``right``: their tokens, as far as they may
    come. False when the run has fewer than ``at`` lines.
    """
    engine, consumed, taken = engine_for(model, mode), [], []
    requests = submit(engine, mode, consumed)
    happened = []
    for line in (at, again):
        if line is not None:
            try:
                with Interrupter(line):
                    taken.extend(engine.run())
            except Interrupt as interrupt:
                happened.append(str(interrupt))
    where = f"interrupted at {happened}"
    for _ in range(1000):
        taken += engine.step()
        if not engine.requests:
            break
    else:
        raise AssertionError(f"the engine does not finish, {where}")
    reasons = REASONS.get(mode, ["length"] * 3)
    for request, tokens, reason in zip(requests, right, reasons, strict=True):
        # An interrupt within the callback's `cancel` may leave its victim alone.
        if request.finish_reason != reason:
            assert (reason, request.finish_reason) == ("cancelled", "length"), where
        told = request.output_tokens
        assert told == tokens[: len(told)] and len(request.token_times) == len(told), where
        assert request.finish_reason != "length" or len(told) == request.max_tokens, where
        assert (request.error is not None) == (reason == "error"), where
        assert request.stream is None or request.text == engine.tokenizer.decode(told), where
        assert len(request.logprobs) in (0, len(told)), where
        for events in (taken, consumed):
            own = [event for event in events if event.request_id == request.id]
            assert [event.token for event in own if event.token is not None] == told, where
            ends = [event.finish_reason for event in own]
            assert ends == [None] * (len(own) - 1) + [request.finish_reason], where
            assert "".join(event.text or "" for event in own) == request.text, where
    assert len(taken) == len(consumed), where
    engine.cache.blocks.check()
    assert engine.stats().used_blocks == 0 and not engine.scheduler.running, where
    assert engine.stats().state_bytes == 0, where
    later = [engine.submit(each.prompt, MAX_TOKENS) for each in requests[:3]]
    ends = Counter(event.finish_reason for event in engine.run())
    assert ends["length"] == 3, where
    for request, tokens in zip(later, right, strict=False):
        assert request.output_tokens == tokens[:MAX_TOKENS], where
    return bool(happened)


def right_tokens(model, mode: str, own=None) -> list[list[int]]:
    """Tokens of the requests of a mode, each for itself and to its full length. ``own``: the model,
    where ``model`` is a runner of it.
    """
    found = []
    for request in submit(engine_for(model, mode), mode, []):
        alone = engine_for(model, mode)
        alone.clock = lambda: 0.0
        options = {} if request.chooser.greedy else {"sampling": {"temperature": 0.8}, "seed": 3}
        again = alone.submit(request.prompt, request.max_tokens, ignore_eos=True, **options)
        list(alone.run())
        if request.chooser.greedy:
            steps = generate_step(
                mx.array(request.prompt), own or model, max_tokens=request.max_tokens
            )
            assert again.output_tokens == [int(token) for token, _ in steps]
        found.append(again.output_tokens)
    return found

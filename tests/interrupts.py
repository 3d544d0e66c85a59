"""Exceptions at any line of the package while an engine runs, and what must hold afterwards. Used
by `test_interrupts.py` and `soak_engine.py`.
"""

import sys
from collections import Counter
from pathlib import Path

from conftest import prompts_of

import cortexlab as cl

PACKAGE = str(Path(cl.__file__).parent)
LENGTHS, MAX_TOKENS = (40, 20, 7), 5

TIGHT = {"num_blocks": 67, "block_size": 1, "watermark": 0.0, "oom_policy": "preempt"}
MODES = {
    "plain": {"num_blocks": 64},
    "prefix cache, pipelined": {"num_blocks": 64, "prefix_caching": True, "pipeline": True},
    "swap": TIGHT | {"preemption": "swap"},  # both preempt twice in each run
    "preempt": TIGHT | {"prefix_caching": True},
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


def interrupted_run(model, right: dict, options: dict, at: int, again: int | None = None) -> bool:
    """Run three requests, interrupt them at line ``at`` and, going on, at line ``again``; assert
    that nothing is lost, told twice or wrong. False when the run has fewer than ``at`` lines.
    """
    engine = cl.Engine(model, **options)
    consumed, taken = [], []
    prompts = prompts_of(LENGTHS, 256)
    requests = [engine.submit(p, MAX_TOKENS, on_token=consumed.append) for p in prompts]
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
        if not (engine.requests or engine._output.outbox):
            break
        taken += engine.step()
    else:
        raise AssertionError(f"the engine does not finish, {where}")
    for request in requests:
        expected = right[request.prompt, MAX_TOKENS]
        assert request.output_tokens == expected, where
        assert len(request.token_times) == MAX_TOKENS and request.error is None, where
        assert request.finish_reason == "length", where
        for events in (taken, consumed):
            own = [event for event in events if event.request_id == request.id]
            assert [event.token for event in own] == expected, where
            assert [event.finish_reason for event in own] == [None] * 4 + ["length"], where
    assert len(taken) == len(consumed) == MAX_TOKENS * len(prompts), where
    engine.cache.blocks.check()
    assert engine.stats().used_blocks == 0 and not engine.scheduler.running, where
    later = [engine.submit(prompt, MAX_TOKENS) for prompt in prompts]
    ends = Counter(event.finish_reason for event in engine.run())
    assert ends["length"] == len(prompts), where
    for request in later:
        assert request.output_tokens == right[request.prompt, MAX_TOKENS], where
    return bool(happened)

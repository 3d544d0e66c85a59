"""Duration of a step: an affine function of its tokens and sequences, given by hand or fitted to
steps that `bench` ran.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import combinations
from pathlib import Path

import numpy as np

from ..errors import BadInput, a_number, a_path, a_sequence, shown

SECOND = 1_000_000_000  # nanoseconds: the unit of the replay's clock
FIELDS = ("base_s", "token_s", "sequence_s")


@dataclass(frozen=True, slots=True)
class StepTime:
    """Seconds of a step: ``base_s + token_s * tokens + sequence_s * sequences``."""

    base_s: float
    token_s: float
    sequence_s: float

    def __post_init__(self):
        for name in FIELDS:
            number = a_number(f"step time: {name}", getattr(self, name), 0, 3600)
            object.__setattr__(self, name, number)
        if not any(self.nanoseconds):
            raise BadInput("step time: a step must take at least a nanosecond")

    @property
    def nanoseconds(self) -> tuple[int, int, int]:
        """The three coefficients in whole nanoseconds."""
        return tuple(round(getattr(self, name) * SECOND) for name in FIELDS)

    @staticmethod
    def load(path: str | Path) -> "StepTime":
        """Read ``step_time.json``, which ``cortexlab bench`` writes beside its results."""
        path = a_path("step time", path)
        try:
            found = json.loads(Path(path).read_text())
        except OSError as error:
            raise BadInput(f"cannot read step time {shown(path)}: {error.strerror}") from error
        except (ValueError, RecursionError) as error:
            raise BadInput(f"step time {shown(path)} is not JSON: {error}") from None
        if not isinstance(found, dict) or any(name not in found for name in FIELDS):
            raise BadInput(f"step time {shown(path)} needs {', '.join(FIELDS)} (in seconds)")
        return StepTime(*(found[name] for name in FIELDS))

    @staticmethod
    def fit(steps: Sequence[tuple[float, int, int]]) -> tuple["StepTime", float]:
        """Non-negative least squares over the steps' ``(seconds, tokens, sequences)``; returns the
        fit and its R squared.

        Every subset of the three coefficients is fitted, and the best fit without a negative
        coefficient wins: the exact solution of NNLS (Lawson and Hanson 1974).
        """
        steps = [a_sequence("a step", step) for step in a_sequence("steps", steps, least=1)]
        if wrong := [step for step in steps if len(step) != len(FIELDS)]:
            raise BadInput(f"a step must be (seconds, tokens, sequences), not {shown(wrong[0])}")
        names = "seconds", "tokens", "sequences"
        steps = [[a_number(f"{names[i]} of a step", step[i]) for i in range(3)] for step in steps]
        seconds, tokens, sequences = np.array(steps).T
        columns = np.stack([np.ones_like(seconds), tokens, sequences], axis=1)
        best, best_error = None, np.inf
        for chosen in (c for n in (1, 2, 3) for c in combinations(range(3), n)):
            found, *_ = np.linalg.lstsq(columns[:, chosen], seconds, rcond=None)
            error = float(((columns[:, chosen] @ found - seconds) ** 2).sum())
            if (found >= 0).all() and error < best_error:
                best, best_error = np.zeros(3), error
                best[list(chosen)] = found
        spread = float(((seconds - seconds.mean()) ** 2).sum())
        return StepTime(*best.tolist()), 1 - best_error / spread if spread else 1.0

    def to_json(self, **notes) -> str:
        return json.dumps(asdict(self) | notes, indent=2)


def checked_step_time(given: object) -> StepTime:
    """``given``, or `BadInput` when it is no `StepTime`."""
    if not isinstance(given, StepTime):
        raise BadInput(f"step_time must be a StepTime, not {shown(given)}")
    return given


# About 40 ms at 60 sequences and 6,000 prompt tokens a second.
reference = StepTime(base_s=0.030, token_s=0.000_01, sequence_s=0.000_1)

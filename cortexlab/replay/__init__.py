"""A workload on the engine's own scheduler and block manager, on a virtual clock and without
tensors.
"""

from .simulation import Replay, reference, replay, tables
from .step_time import StepTime

__all__ = ["Replay", "StepTime", "reference", "replay", "tables"]

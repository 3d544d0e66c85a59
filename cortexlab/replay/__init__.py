"""A workload on the engine's own scheduler and block manager, on a virtual clock and without
tensors.
"""

from .simulation import Replay, replay
from .step_time import StepTime, reference
from .tables import tables

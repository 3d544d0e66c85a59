"""What arrives: made workloads and traces. No MLX."""

from .synthetic import (
    WorkItem,
    arrivals,
    conversations,
    generator,
    make_workload,
    scale,
    with_arrivals,
)
from .traces import load_trace

__all__ = [
    "WorkItem",
    "arrivals",
    "conversations",
    "generator",
    "load_trace",
    "make_workload",
    "scale",
    "with_arrivals",
]

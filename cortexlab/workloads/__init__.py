"""Requests to come: synthetic workloads and traces. No MLX."""

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

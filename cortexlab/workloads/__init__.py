"""Requests to come: synthetic workloads and traces. No MLX."""

from .synthetic import (
    WorkItem,
    arrivals,
    conversations,
    generator,
    make_workload,
)

"""Figures: functions from data frames to Axes. They never measure, and import no MLX; units stand
on every axis. Widgets are in `cortexlab.plots.widgets`.
"""

from ..metrics import SHARES
from .allocators import cost_by_pool_size, toy_pools, what_it_gives_up
from .block_map import (
    address_heat,
    address_heat_map,
    block_map,
    block_owners,
    draw_map,
    lengths_of_runs,
    map_image,
    run_length_histograms,
    run_lengths,
    step_at,
)
from .engine import against_batch_limit, attention_against_extents, where_a_step_goes
from .fragmentation import (
    PUBLISHED_WORDS,
    empty_beside_theory,
    four_granularities,
    holes_over_time,
    kv_bytes_by_context,
    prefix_hits,
    published_beside_ours,
    run_length_frontier,
    shares_beside_ttft,
    shares_by_workload,
)
from .load import load_curve, padding_curve, pareto_front, request_timeline
from .run import (
    SWEEP_WORDS,
    bench_figures,
    block_size_curves,
    extents_against_ttft,
    latency_distribution,
    memory_over_time,
    replay_figures,
    sweep_figure,
    throughput_against_ttft,
)
from .style import STYLE, WIDTH, color, use_style

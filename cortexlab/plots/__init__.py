"""Figures: functions from data frames to Axes. They never measure, and import no MLX; widgets are
in `cortexlab.plots.widgets`.
"""

from .allocators import cost_by_pool_size, toy_pools, what_it_gives_up
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
from .load import (
    address_heat,
    address_heat_map,
    lengths_of_runs,
    load_curve,
    on_front,
    padding_curve,
    pareto_front,
    request_timeline,
    run_length_histograms,
    run_lengths,
)
from .run import *
from .run import SEQUENCE_COLORS, SHARE_COLORS, SHARE_WORDS, STYLE, SWEEP_WORDS, WIDTH

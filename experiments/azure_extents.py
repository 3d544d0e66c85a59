"""Decode attention under `runs` on the extents that a replay of the Azure conversation trace
leaves, beside contiguous ones.

    python experiments/azure_extents.py

The trace runs on a pool of 60 %; at ten instants all decoding sequences' extents are taken down.
For each instant, attention of SmolLM2's layers over these extents (by the engine's rule) is
measured in turn with the same lengths in one extent each, as views and by the rule. Needs the trace
(``CORTEXLAB_TRACES``).
"""

import cortexlab  # before MLX # isort: skip # noqa: F401
from statistics import median

import mlx.core as mx
import pandas as pd

from cortexlab.bench.step_profile import attend, filled_arena, time_in_turn
from cortexlab.engine.arena import LayerShape
from cortexlab.engine.attention import RowRun
from cortexlab.replay.simulation import Replay, replay
from cortexlab.scheduler.block_manager import slot_runs
from cortexlab.workloads.traces import load_trace

LAYERS, HEADS = [LayerShape(3, 64, 64)] * 2, 9
INSTANTS, REPEATS = 10, 7


class Watched(Replay):
    """Takes down every decoding sequence's slots with every hundredth sample."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.seen: list[list[RowRun]] = []

    def _sample(self, *args) -> None:
        super()._sample(*args)
        if len(self.samples) % 100 == 0:
            self.seen.append(
                [
                    rows_of(request, self)
                    for request in self.scheduler.running
                    if request.base is not None
                ]
            )


def rows_of(request, run: Replay) -> RowRun:
    tokens = request.base + run.step
    return RowRun(
        tokens - 1, 1, list(slot_runs(request.table.all_extents, run.blocks.block_size, 0, tokens))
    )


def main() -> None:
    items = load_trace("azure_2023_conv")
    (paged,) = replay(items, ["paged"], num_blocks="60%")
    run = Watched("runs", num_blocks=paged.blocks.num_blocks)
    run.run(items)
    arena = filled_arena(LAYERS, mx.float32, run.blocks.num_blocks * run.blocks.block_size, 0)
    found = []
    for rows in run.seen[:: max(1, len(run.seen) // INSTANTS)]:
        ends = pd.Series([row.stop for row in rows]).cumsum().tolist()
        whole = [
            RowRun(row.start, 1, [(end - row.stop, end)])
            for row, end in zip(rows, ends, strict=True)
        ]
        works = {
            "runs": lambda rows=rows: attend(rows, arena, HEADS, "auto"),
            "views": lambda rows=whole: attend(rows, arena, HEADS, "views"),
            "contiguous": lambda rows=whole: attend(rows, arena, HEADS, "auto"),
        }
        times = time_in_turn(works, REPEATS)
        ms = {name: 1000 * median(seconds) / len(LAYERS) for name, seconds in times.items()}
        extents = sum(len(row.runs) for row in rows)
        found.append({"sequences": len(rows), "tokens": ends[-1], "extents": extents} | ms)
    table = pd.DataFrame(found)
    table["runs/views"], table["runs/contiguous"] = (
        table["runs"] / table["views"],
        table["runs"] / table["contiguous"],
    )
    print(table.round(2).to_string(index=False))
    print(
        "median",
        table[["runs/views", "runs/contiguous"]].median().round(2).to_dict(),
        "(ms a layer)",
    )


if __name__ == "__main__":
    main()

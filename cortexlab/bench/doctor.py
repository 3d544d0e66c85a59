"""How fast this machine's arithmetic and memory are, and what to do where it falls short."""

import math
from collections.abc import Iterator
from pathlib import Path
from statistics import median

import mlx.core as mx

from ..engine.arena import LayerShape
from ..errors import CortexLabError
from ..host import blas, models
from .environment import environment
from .measure import in_turn
from .step_profile import measure_extents

SLOW_SGEMM_GFLOPS = 20.0  # the reference BLAS gives 2, two old cores with OpenBLAS 60 and more
EXTENT_SLOTS = 4, 16, 128, 512  # slots an extent, for which `examine` measures attention
SEQUENCES, CONTEXT = 8, 512  # sequences, and tokens of each, whose attention is measured
SHAPE = 1024, 576, 1536  # rows, inner and columns of the measured product: SmolLM2's MLP
NEEDED_GIB = 3  # of memory: the float32 model, an arena, and mlx-lm's batch beside it


def examine() -> dict:
    """`environment`, measured GFLOP/s and GB/s, the model's path, and ``problems: [{what, cure,
    needed}]``.
    """
    found = environment()
    found["blas_path"] = blas.active.path
    found["sgemm_gflops"] = sgemm_gflops()
    found["memory_bandwidth_gb_s"] = memory_bandwidth()
    found["attention"] |= {"ms_a_layer": attention_ms()}
    path = models.find_smollm2()
    found["model"] = str(path) if path else None
    found["problems"] = [*_model_problems(path), *_machine_problems(found)]
    return found


def can_run(found: dict) -> bool:
    """Whether the main job could run: slow arithmetic alone does not prevent it."""
    return not any(problem["needed"] for problem in found["problems"])


# --- measurements ---------------------------------------------------------------------------------


def sgemm_gflops() -> float:
    """Median GFLOP/s of a float32 product of `SHAPE`."""
    a, b = mx.random.normal(SHAPE[:2]), mx.random.normal(SHAPE[1:])
    mx.eval(a, b)
    (seconds,) = in_turn({"sgemm": lambda: mx.eval(a @ b)}, 9).values()
    return 2 * math.prod(SHAPE) / median(seconds) / 1e9


def memory_bandwidth() -> float:
    """Median GB/s at which a matrix-vector product reads 256 MiB of float32 weights: the bound of
    decoding at batch 1.
    """
    x, weights = mx.ones((1, 8192)), mx.ones((8192, 8192))
    mx.eval(x, weights)
    (seconds,) = in_turn({"read": lambda: mx.eval(x @ weights)}, 5).values()
    return weights.nbytes / median(seconds) / 1e9


def attention_ms(repeats: int = 3) -> list[dict]:
    """Decode attention of `SEQUENCES` of `CONTEXT` tokens, SmolLM2's layers, by method and length
    of extents: median ms a layer.
    """
    return measure_extents(
        [LayerShape(3, 64, 64)] * 10, 9, EXTENT_SLOTS, SEQUENCES, CONTEXT, repeats=repeats
    ).to_dict("records")


# --- problems -------------------------------------------------------------------------------------


def _model_problems(model: Path | None) -> Iterator[dict]:
    fetch = "run: cortexlab fetch-model"
    if model is None:
        yield _problem("the embedded model is not here", fetch, needed=True)
    else:
        try:
            models.check_sha256(model)
        except CortexLabError as error:
            yield _problem(str(error), fetch, needed=True)


def _machine_problems(found: dict) -> Iterator[dict]:
    if found["device"] == "cpu" and found["sgemm_gflops"] < SLOW_SGEMM_GFLOPS:
        why = blas.active.note or f"{blas.active.name} is slow here"
        yield _problem(
            f"matrix products run at {found['sgemm_gflops']:.1f} GFLOP/s: {why}",
            "install OpenBLAS (Debian: libopenblas0), or `pip install mkl` on x86-64, or set "
            "CORTEXLAB_BLAS to a library",
        )
    if found["openblas_coretype"] and blas.active.name == "OpenBLAS":
        yield _problem(
            f"OPENBLAS_CORETYPE={found['openblas_coretype']} may keep OpenBLAS from this "
            "processor's kernels",
            "unset OPENBLAS_CORETYPE",
        )
    if blas.needed() and not found["cpp_compiler"]:
        yield _problem(
            "no g++: MLX cannot compile element-wise functions for the CPU, which costs some speed",
            "install g++ (optional)",
        )
    if found["memory_bytes"] < NEEDED_GIB << 30:
        yield _problem(
            f"{found['memory_bytes'] / 2**30:.1f} GiB of memory",
            f"the main job wants {NEEDED_GIB} GiB: use --model tiny",
            needed=True,
        )


def _problem(what: str, cure: str, needed: bool = False) -> dict:
    return {"what": what, "cure": cure, "needed": needed}


# --- the printed form -----------------------------------------------------------------------------


def report(found: dict) -> str:
    """The printed form of `examine`."""
    gib = found["memory_bytes"] / 2**30
    lines = [
        f"cortexlab {found['cortexlab_version']}, Python {found['python_version']}, "
        f"{found['platform']}",
        f"MLX        {found['mlx_version']} on the {found['device']}, mlx-lm "
        f"{found['mlx_lm_version']}",
        f"processor  {found['processor']}, {found['cores']} cores",
        f"BLAS       {found['blas']}: {found['sgemm_gflops']:.0f} GFLOP/s (float32, "
        f"{' x '.join(map(str, SHAPE))})",
        f"memory     {gib:.1f} GiB, {found['memory_bandwidth_gb_s']:.1f} GB/s (read by a "
        "matrix-vector product)",
        *_attention_lines(found["attention"]["ms_a_layer"]),
        "compiler   "
        f"{found['cpp_compiler'] or 'none: MLX runs its compiled functions piece by piece'}",
        f"model      {found['model'] or 'not here'}",
    ]
    if found["openblas_coretype"]:
        lines.append(f"OPENBLAS_CORETYPE is set to {found['openblas_coretype']}")
    for problem in found["problems"]:
        lines += [f"PROBLEM    {problem['what']}", f"   cure    {problem['cure']}"]
    lines.append("The main job can run." if can_run(found) else "The main job cannot run.")
    return "\n".join(lines)


def _attention_lines(measured: list[dict]) -> list[str]:
    methods = list(dict.fromkeys(row["method"] for row in measured))
    lines = [
        f"attention  ms a layer, {SEQUENCES} sequences of {CONTEXT} tokens"
        + "".join(f"{method:>9}" for method in methods)
    ]
    for slots in dict.fromkeys(row["extent_slots"] for row in measured):
        each = [row["ms"] for row in measured if row["extent_slots"] == slots]
        lines.append(
            f"           in extents of {slots:4d} slots".ljust(len(lines[0]) - 9 * len(methods))
            + "".join(f"{ms:9.2f}" for ms in each)
        )
    return lines

"""What machine this is, how fast its arithmetic and memory are, and what to do where it falls
short.
"""

import os
import platform
import shutil
import subprocess
import sys
import time
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from statistics import median

from ..host import blas

SLOW_SGEMM_GFLOPS = 20.0  # the reference BLAS gives 2, two old cores with OpenBLAS 60 and more
EXTENT_SLOTS = 4, 16, 128, 512  # slots an extent, for which `examine` measures attention
NEEDED_MEMORY_BYTES = 3 << 30  # the float32 model, an arena, and mlx-lm's batch beside it


def machine() -> dict:
    """What a result must say about where it was made, if no tensor was."""
    return {
        "date": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "cortexlab_version": metadata.version("cortexlab"),
        "commit": _commit(),
        "python_version": platform.python_version(),
        "platform": platform.platform(),
        "processor": processor(),
        "cores": os.cpu_count(),
        "memory_bytes": memory_bytes(),
    }


def environment() -> dict:
    """What a result must say about where it was measured."""
    import mlx.core as mx

    from ..engine import attention

    return machine() | {
        "mlx_version": metadata.version("mlx"),
        "mlx_lm_version": metadata.version("mlx-lm"),
        "device": str(mx.default_device().type).rpartition(".")[2],
        "blas": blas.active.name,
        "blas_block_time_ms": os.environ.get("KMP_BLOCKTIME"),
        "attention": attention.rule(),
        "cpp_compiler": compiler(),
        "openblas_coretype": os.environ.get("OPENBLAS_CORETYPE"),
    }


def examine() -> dict:
    """`environment`, measured GFLOP/s and GB/s, where the model is, and ``problems: [{what,
    cure}]``.
    """
    from ..host import models as model

    found = environment()
    found["blas_path"] = blas.active.path
    found["sgemm_gflops"] = sgemm_gflops()
    found["memory_bandwidth_gb_s"] = memory_bandwidth()
    found["attention"] |= {"ms_a_layer": attention_ms()}
    path = model.find_smollm2()
    found["model"] = str(path) if path else None
    found["problems"] = _problems(found, path)
    return found


def can_run(found: dict) -> bool:
    """Whether the main job could run: everything but a missing speed is needed."""
    return not any(problem["needed"] for problem in found["problems"])


def sgemm_gflops(repeats: int = 9) -> float:
    """float32 product ``[1024, 576] @ [576, 1536]``, SmolLM2's MLP: median GFLOP/s."""
    import mlx.core as mx

    a, b = mx.random.normal((1024, 576)), mx.random.normal((576, 1536))
    mx.eval(a, b)
    return 2 * 1024 * 576 * 1536 / _seconds(lambda: mx.eval(a @ b), repeats) / 1e9


def memory_bandwidth(repeats: int = 5) -> float:
    """GB/s at which a matrix-vector product reads 256 MiB of float32 weights, what bounds decoding
    at batch 1: median.
    """
    import mlx.core as mx

    x, weights = mx.ones((1, 8192)), mx.ones((8192, 8192))
    mx.eval(x, weights)
    return weights.nbytes / _seconds(lambda: mx.eval(x @ weights), repeats) / 1e9


def attention_ms(repeats: int = 3) -> list[dict]:
    """Decode attention of 8 sequences of 512 tokens, SmolLM2's layers, by method and length of
    extents: median ms a layer.
    """
    from ..engine.arena import LayerShape
    from .step_profile import measure_extents

    return measure_extents(
        [LayerShape(3, 64, 64)] * 10, 9, EXTENT_SLOTS, 8, 512, repeats=repeats
    ).to_dict("records")


def memory_bytes() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def compiler() -> str | None:
    """The C++ compiler that MLX's CPU build would use for compiled functions; None: it then runs
    them piece by piece.
    """
    return shutil.which("g++")


def processor() -> str:
    if sys.platform == "darwin":
        done = subprocess.run(
            ["sysctl", "-n", "machdep.cpu.brand_string"], capture_output=True, text=True
        )
        return done.stdout.strip() or platform.processor()
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next(
        (line.partition(":")[2].strip() for line in lines if line.startswith("model name")),
        platform.machine(),
    )


def report(found: dict) -> str:
    """The printed form of `examine`."""
    gib = found["memory_bytes"] / 2**30
    lines = [
        f"cortexlab {found['cortexlab_version']}, Python {found['python_version']}, "
        f"{found['platform']}",
        f"MLX        {found['mlx_version']} on the {found['device']}, mlx-lm "
        f"{found['mlx_lm_version']}",
        f"processor  {found['processor']}, {found['cores']} cores",
        f"BLAS       {found['blas']}: {found['sgemm_gflops']:.0f} GFLOP/s (float32, 1024 x 576 x "
        "1536)",
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
        "attention  ms a layer, 8 sequences of 512 tokens"
        + "".join(f"{method:>9}" for method in methods)
    ]
    for slots in dict.fromkeys(row["extent_slots"] for row in measured):
        each = [row["ms"] for row in measured if row["extent_slots"] == slots]
        lines.append(
            f"           in extents of {slots:4d} slots".ljust(len(lines[0]) - 9 * len(methods))
            + "".join(f"{ms:9.2f}" for ms in each)
        )
    return lines


def _problems(found: dict, path: Path | None) -> list[dict]:
    from ..errors import CortexLabError
    from ..host import models as model

    problems = []

    def problem(what: str, cure: str, needed: bool = False) -> None:
        problems.append({"what": what, "cure": cure, "needed": needed})

    if path is None:
        problem("the embedded model is not here", "run: cortexlab fetch-model", needed=True)
    else:
        try:
            model.check_sha256(path)
        except CortexLabError as error:
            problem(str(error), "run: cortexlab fetch-model", needed=True)
    if found["device"] == "cpu" and found["sgemm_gflops"] < SLOW_SGEMM_GFLOPS:
        why = blas.active.note or f"{blas.active.name} is slow here"
        cure = (
            "install OpenBLAS (Debian: libopenblas0), or `pip install mkl` on x86-64, or set "
            "CORTEXLAB_BLAS to a library"
        )
        problem(f"matrix products run at {found['sgemm_gflops']:.1f} GFLOP/s: {why}", cure)
    if found["openblas_coretype"] and blas.active.name == "OpenBLAS":
        what = (
            f"OPENBLAS_CORETYPE={found['openblas_coretype']} may keep OpenBLAS from this "
            "processor's kernels"
        )
        problem(what, "unset OPENBLAS_CORETYPE")
    if blas.needed() and not found["cpp_compiler"]:
        problem(
            "no g++: MLX cannot compile element-wise functions for the CPU, which costs some speed",
            "install g++ (optional)",
        )
    if found["memory_bytes"] < NEEDED_MEMORY_BYTES:
        problem(
            f"{found['memory_bytes'] / 2**30:.1f} GiB of memory",
            "the main job wants 3 GiB: use --model tiny",
            needed=True,
        )
    return problems


def _seconds(work, repeats: int) -> float:
    work()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return median(times)


def _commit() -> str | None:
    """The commit of the source this runs from, with a ``+`` when it has been edited; None for an
    installed copy.
    """
    folder = Path(__file__).parents[1]

    def git(*words: str) -> str | None:
        try:
            done = subprocess.run(
                ["git", "-C", str(folder), *words], capture_output=True, text=True
            )
        except OSError:
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    commit = git("rev-parse", "--short=12", "HEAD")
    return commit and commit + ("+" if git("status", "--porcelain", "--", str(folder)) else "")

"""What a result says about where it was made: machine, versions, commit. Importing it loads no
MLX.
"""

import os
import platform
import shutil
import subprocess
import sys
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path

from ..host import blas


def machine() -> dict:
    """What every result says about where it was made; enough for one without tensors."""
    return {
        "date": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "cortexlab_version": metadata.version("cortexlab"),
        "commit": commit(),
        "python_version": platform.python_version(),
        "platform": platform.platform(),
        "processor": processor(),
        "cores": os.cpu_count(),
        "memory_bytes": memory_bytes(),
    }


def environment() -> dict:
    """`machine`, and what decides the speed of MLX here. Loads MLX."""
    import mlx.core as mx

    return machine() | {
        "mlx_version": metadata.version("mlx"),
        "mlx_lm_version": metadata.version("mlx-lm"),
        "device": str(mx.default_device().type).rpartition(".")[2],
        "blas": blas.active.name,
        "blas_block_time_ms": os.environ.get("KMP_BLOCKTIME"),
        "attention": attention_rule(),
        "cpp_compiler": compiler(),
        "openblas_coretype": os.environ.get("OPENBLAS_CORETYPE"),
    }


def attention_rule() -> dict:
    """What the attention method ``auto`` goes by on this machine."""
    import mlx.core as mx

    from ..engine.attention import plan, windows
    from ..host import fast_math

    return {
        "window_slots": windows.WINDOW,
        "streams": len(windows.STREAMS) + 1 if mx.default_device() == mx.cpu else 1,
        "products_a_stream": windows.PRODUCTS_A_STREAM,
        "views_up_to_rows": plan.VIEWS_UP_TO_ROWS,
        "views_up_to_tokens": plan.VIEWS_UP_TO_TOKENS,
        "gather_below_slots": plan.GATHER_BELOW,
        "gather_prompts_from_extents": plan.GATHER_FROM_EXTENTS + 1,
        "gather_prompts_below_slots": plan.GATHER_PROMPTS_BELOW,
        "fast_math": fast_math.wanted(),
    }


def memory_bytes() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def compiler() -> str | None:
    """Path of the C++ compiler that MLX's CPU build uses for compiled functions. Without one (None)
    MLX runs them piece by piece.
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


def commit() -> str | None:
    """The commit of the package's source, with a ``+`` where the source has been edited; None for
    an installed copy.
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

    revision = git("rev-parse", "--short=12", "HEAD")
    return revision and revision + ("+" if git("status", "--porcelain", "--", str(folder)) else "")

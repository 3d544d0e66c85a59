"""An optimized BLAS for MLX's Linux CPU build, loaded before MLX is.

MLX's Linux CPU wheel links the reference BLAS: 2 GFLOP/s where OpenBLAS or MKL give 100 and more.
The dynamic linker resolves ``cblas_sgemm`` to the first library in the global scope that has it, so
a BLAS opened with ``RTLD_GLOBAL`` *before* ``import mlx.core`` replaces the reference BLAS. macOS
(Accelerate, Metal) and CUDA builds need no other BLAS.

``KMP_BLOCKTIME``, unless it is set already, becomes 1: MKL's threads then sleep after 1 ms without
work instead of spinning for 200, and MLX's own operations between two matrix products get the
cores. A decode step of 32 rows takes five sixths of the time.
"""

import ctypes
import ctypes.util
import os
import sys
import warnings
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

PATTERNS = ("libopenblas.so*", "libmkl_rt.so*")  # file names, the preferred library first
SYSTEM_FOLDERS = (
    "/usr/lib",
    "/usr/lib64",
    "/usr/local/lib",
    "/opt/intel/oneapi/mkl/latest/lib",
    "/opt/OpenBLAS/lib",
)


@dataclass(frozen=True, slots=True)
class Blas:
    """The BLAS that MLX uses. ``path`` is None when no library was loaded; ``note`` says why."""

    name: str
    path: str | None = None
    note: str | None = None


def needed() -> bool:
    """Whether this machine runs MLX's Linux CPU build."""
    if sys.platform != "linux":
        return False
    return not any(_installed(name) for name in ("mlx-cuda", "mlx-cuda-12", "mlx-cuda-13"))


def candidates() -> list[Path]:
    """BLAS libraries in order of preference: ``$CORTEXLAB_BLAS`` alone if set, else those of the
    system, of conda, and of the package ``mkl``.
    """
    chosen = os.environ.get("CORTEXLAB_BLAS")
    if chosen:
        return [Path(chosen)]
    found = [
        Path(name) for lib in ("openblas", "mkl_rt") if (name := ctypes.util.find_library(lib))
    ]
    conda = os.environ.get("CONDA_PREFIX")
    folders = (
        [Path(folder) for folder in SYSTEM_FOLDERS]
        + ([Path(conda) / "lib"] if conda else [])
        + [Path(sys.prefix) / "lib"]
    )
    for folder in folders:
        for pattern in PATTERNS:
            found += sorted(folder.glob(pattern), reverse=True)
    return found + _from_package("mkl", "libmkl_rt.so")


def load() -> Blas:
    """Load the first candidate that opens and has ``cblas_sgemm``. Never raises: `cortexlab doctor`
    reports the result.
    """
    if not needed():
        return Blas("Accelerate" if sys.platform == "darwin" else "the GPU backend's own")
    if "mlx.core" in sys.modules:
        warnings.warn(
            "mlx was imported before cortexlab, so its slow reference BLAS stays in use: import "
            "cortexlab first",
            RuntimeWarning,
            stacklevel=3,
        )
        return Blas("MLX's own (reference)", note="mlx was imported before cortexlab")
    os.environ.setdefault("KMP_BLOCKTIME", "1")
    failures = []
    for path in candidates():
        try:
            library = ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL)
            library.cblas_sgemm  # noqa: B018 - the look-up is the check
        except (OSError, AttributeError) as error:
            failures.append(f"{path}: {error}")
            continue
        return Blas(
            "MKL" if "mkl" in path.name else "OpenBLAS" if "openblas" in path.name else path.name,
            str(path),
        )
    return Blas("MLX's own (reference)", note="; ".join(failures) or "no OpenBLAS or MKL found")


def _installed(package: str) -> bool:
    try:
        metadata.distribution(package)
    except metadata.PackageNotFoundError:
        return False
    return True


def _from_package(package: str, prefix: str) -> list[Path]:
    """Files of an installed Python package whose file name starts with ``prefix``, wherever pip put
    them (a user install lies outside ``sys.prefix``).
    """
    try:
        files = metadata.files(package) or []
    except metadata.PackageNotFoundError:
        return []
    return [
        path
        for file in files
        if file.name.startswith(prefix) and (path := Path(file.locate())).exists()
    ]


active = load()

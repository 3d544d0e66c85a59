"""cortexlab: how should an LLM's KV cache be laid out and allocated, at which block size, and what
does it cost?

Importing the package loads no MLX: names that need it are resolved on first use. On Linux CPU it
does load an optimized BLAS (`cortexlab.host.blas`), which must come before MLX is imported.
"""

from importlib import import_module, metadata

from .allocators import Allocator, Extent, Stats, make_allocator
from .errors import BadInput, CortexLabError, ModelError, NotContiguous
from .host import blas
from .lab.cortexstream import KVBlockAllocator, KVHandle
from .options import SamplingParams
from .scheduler.request import Request, RequestState, TokenEvent

__version__ = metadata.version("cortexlab")
_NEED_MLX = {
    "Engine": ".engine.engine",
    "KVCache": ".lab.cortexstream_cache",
    "load_model": ".host.models",
}

__all__ = [
    "Allocator",
    "BadInput",
    "CortexLabError",
    "Engine",
    "Extent",
    "KVBlockAllocator",
    "KVCache",
    "KVHandle",
    "ModelError",
    "NotContiguous",
    "Request",
    "RequestState",
    "SamplingParams",
    "Stats",
    "TokenEvent",
    "__version__",
    "blas",
    "load_model",
    "make_allocator",
]


def __getattr__(name: str):
    if name in _NEED_MLX:
        return getattr(import_module(_NEED_MLX[name], __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

"""Where fetched files live."""

import os
from pathlib import Path

import platformdirs


def cache_folder() -> Path:
    """``$CORTEXLAB_CACHE``, else the platform's user cache."""
    return Path(os.environ.get("CORTEXLAB_CACHE") or platformdirs.user_cache_dir("cortexlab"))

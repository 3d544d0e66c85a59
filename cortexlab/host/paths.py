"""Where files live: what was fetched, and what came with the package."""

import os
from importlib import metadata
from pathlib import Path

import platformdirs

# under the environment's prefix, where a wheel puts notebooks and experiments (pyproject.toml)
SHARED = "share/cortexlab"


def cache_folder() -> Path:
    """``$CORTEXLAB_CACHE``, else the platform's user cache."""
    return Path(os.environ.get("CORTEXLAB_CACHE") or platformdirs.user_cache_dir("cortexlab"))


def shipped(folder: str) -> Path:
    """``notebooks`` or ``experiments`` as they came with the package: from its wheel, else from the
    checkout it runs from.
    """
    for file in metadata.files("cortexlab") or []:
        if file.as_posix().endswith(f"{SHARED}/{folder}/{file.name}"):
            return Path(file.locate()).resolve().parent
    return Path(__file__).parents[2] / folder

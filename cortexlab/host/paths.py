"""Folders of fetched files and of files shipped with the package."""

import os
from importlib import metadata
from pathlib import Path

import platformdirs

# Folder under the environment's prefix for a wheel's notebooks and experiments (pyproject.toml).
SHARED = "share/cortexlab"


def cache_folder() -> Path:
    """The cache folder: ``$CORTEXLAB_CACHE``, else the platform's user cache."""
    return Path(os.environ.get("CORTEXLAB_CACHE") or platformdirs.user_cache_dir("cortexlab"))


def shipped(folder: str) -> Path:
    """The folder ``notebooks`` or ``experiments`` shipped with the package: the installed wheel's,
    else the source checkout's.
    """
    for file in metadata.files("cortexlab") or []:
        if file.as_posix().endswith(f"{SHARED}/{folder}/{file.name}"):
            return Path(file.locate()).resolve().parent
    return Path(__file__).parents[2] / folder

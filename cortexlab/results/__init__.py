"""Results on disk, sweeps over parameters, and what a result says."""

from .store import read_rows

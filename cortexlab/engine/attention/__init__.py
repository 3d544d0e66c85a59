"""Attention over extents; `Plan` is where a step's rows read and write."""

from ...options import ATTENTION_METHODS as METHODS
from .plan import Plan, check_method
from .views import RowRun, tail
from .windows import WINDOW

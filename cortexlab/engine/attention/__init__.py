"""Attention over extents; `Plan` is where a step's rows read and write."""

from .plan import Plan, check_method
from .views import RowRun
from .windows import WINDOW

"""Where a run's numbers, texts and pictures go."""

from __future__ import annotations

from vbon_lightning.loggers.media import log_figure, log_table
from vbon_lightning.loggers.run_logger import COMPARED, RunLogger

__all__ = ["COMPARED", "RunLogger", "log_figure", "log_table"]

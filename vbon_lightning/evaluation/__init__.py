"""Comparison of policies with each other and with Best-of-N: numbers, tables, figures."""

from __future__ import annotations

from vbon_lightning.evaluation.cost_drawing import cost_figure
from vbon_lightning.evaluation.drawing import pareto_figure
from vbon_lightning.evaluation.intervals import Estimate, estimate_mean
from vbon_lightning.evaluation.reports import PolicyReport, bon_reports, evaluate_policy
from vbon_lightning.evaluation.texts import ScoredText, TextSample, text_samples
from vbon_lightning.evaluation.writing import write_comparison

__all__ = [
    "Estimate",
    "PolicyReport",
    "ScoredText",
    "TextSample",
    "bon_reports",
    "cost_figure",
    "estimate_mean",
    "evaluate_policy",
    "pareto_figure",
    "text_samples",
    "write_comparison",
]

"""Lightning callbacks; they read only the rollout in a step's outputs, and do nothing where there is none."""

from __future__ import annotations

from vbon_lightning.callbacks.best_policy import BestPolicy
from vbon_lightning.callbacks.collapse_warning import CollapseWarning
from vbon_lightning.callbacks.dial_calibration import DialCalibration
from vbon_lightning.callbacks.finite_check import FiniteCheck
from vbon_lightning.callbacks.kl_monitor import KLMonitor
from vbon_lightning.callbacks.policy_export import PolicyExport
from vbon_lightning.callbacks.reference_table_writer import ReferenceTableWriter
from vbon_lightning.callbacks.reward_monitor import RewardMonitor
from vbon_lightning.callbacks.sample_table import SampleTable
from vbon_lightning.callbacks.tensorboard_layout import TensorBoardLayout
from vbon_lightning.callbacks.whole_checkpoints import WholeCheckpoints
from vbon_lightning.callbacks.win_rate import BestOfNWinRate

__all__ = [
    "BestOfNWinRate",
    "BestPolicy",
    "CollapseWarning",
    "DialCalibration",
    "FiniteCheck",
    "KLMonitor",
    "PolicyExport",
    "ReferenceTableWriter",
    "RewardMonitor",
    "SampleTable",
    "TensorBoardLayout",
    "WholeCheckpoints",
]

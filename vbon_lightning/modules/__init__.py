"""LightningModules: siblings that differ by what they maximise."""

from vbon_lightning.modules.a_star_po import AStarPO
from vbon_lightning.modules.bon_distillation import BoNDistillation
from vbon_lightning.modules.bon_regression import BoNRegression
from vbon_lightning.modules.bon_sft import BoNSFT
from vbon_lightning.modules.bond import BOND
from vbon_lightning.modules.dpo import DPO
from vbon_lightning.modules.grpo import GRPO
from vbon_lightning.modules.infalign import InfAlignCTRL
from vbon_lightning.modules.j_bond import JBOND
from vbon_lightning.modules.kl_rl import KLRL
from vbon_lightning.modules.max_at_k import MaxAtK
from vbon_lightning.modules.n_schedule import NSchedule
from vbon_lightning.modules.pf_ppo import PFPPO
from vbon_lightning.modules.qrpo import QRPO
from vbon_lightning.modules.reference_sampler import ReferenceSampler
from vbon_lightning.modules.reward_modelling import RewardModelling
from vbon_lightning.modules.rloo import RLOO
from vbon_lightning.modules.sft import SFT
from vbon_lightning.modules.value_modelling import ValueModelling
from vbon_lightning.modules.vbon import VBoN
from vbon_lightning.modules.wind import WIND

__all__ = [
    "BOND",
    "DPO",
    "GRPO",
    "JBOND",
    "KLRL",
    "PFPPO",
    "QRPO",
    "RLOO",
    "SFT",
    "WIND",
    "AStarPO",
    "BoNDistillation",
    "BoNRegression",
    "BoNSFT",
    "InfAlignCTRL",
    "MaxAtK",
    "NSchedule",
    "ReferenceSampler",
    "RewardModelling",
    "VBoN",
    "ValueModelling",
]

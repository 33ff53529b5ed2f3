"""LightningModules: siblings that differ by what they maximise."""

from vbon_lightning.modules.bon_distillation import BoNDistillation
from vbon_lightning.modules.bon_sft import BoNSFT
from vbon_lightning.modules.bond import BOND
from vbon_lightning.modules.dpo import DPO
from vbon_lightning.modules.j_bond import JBOND
from vbon_lightning.modules.kl_rl import KLRL
from vbon_lightning.modules.reference_sampler import ReferenceSampler
from vbon_lightning.modules.reward_modelling import RewardModelling
from vbon_lightning.modules.sft import SFT
from vbon_lightning.modules.value_modelling import ValueModelling
from vbon_lightning.modules.vbon import VBoN
from vbon_lightning.modules.wind import WIND

__all__ = [
    "BOND",
    "DPO",
    "JBOND",
    "KLRL",
    "SFT",
    "WIND",
    "BoNDistillation",
    "BoNSFT",
    "ReferenceSampler",
    "RewardModelling",
    "VBoN",
    "ValueModelling",
]

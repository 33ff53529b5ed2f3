"""LightningModules: siblings that differ by what they maximise."""

from vbon_lightning.modules.bon_sft import BoNSFT
from vbon_lightning.modules.dpo import DPO
from vbon_lightning.modules.kl_rl import KLRL
from vbon_lightning.modules.reference_sampler import ReferenceSampler
from vbon_lightning.modules.reward_modelling import RewardModelling
from vbon_lightning.modules.sft import SFT
from vbon_lightning.modules.vbon import VBoN

__all__ = ["DPO", "KLRL", "SFT", "BoNSFT", "ReferenceSampler", "RewardModelling", "VBoN"]

"""The policy, its reference and the reward: named by an :class:`ActorSpec`, loaded as :class:`Actors`."""

from vbon_lightning.actors.anchor import average_anchor, make_anchor, replace_anchor
from vbon_lightning.actors.loaded import Actors
from vbon_lightning.actors.spec import ActorSpec
from vbon_lightning.actors.value_model import check_value_model

__all__ = ["ActorSpec", "Actors", "average_anchor", "check_value_model", "make_anchor", "replace_anchor"]

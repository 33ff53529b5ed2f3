"""Best-of-N Distillation."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from vbon_lightning.actors import ActorSpec
from vbon_lightning.functional import RewardCDF, Target, bond_target
from vbon_lightning.modules.base import check_unused
from vbon_lightning.modules.forward_term import Divergence
from vbon_lightning.modules.vbon import VBoN


class BOND(VBoN):
    r"""Fine-tune the policy towards Best-of-N of an anchor that the policy replaces, again and again.

    Minimises the backward KL to Best-of-N of the anchor, the forward one, or Jeffreys' mixture
    :math:`(1-b) KL(\pi_{bon} \| \pi) + b KL(\pi \| \pi_{bon})`, all divided by :math:`N - 1`. With an anchor that is
    replaced every K updates, each stage ending where it should, the M-th ends at Best-of-:math:`N^M` of the reference.
    With one that stays, and both terms of the reward, it is :class:`~vbon_lightning.modules.vbon.VBoN`. Sessa, Dadashi,
    Hussenot et al., "BOND: Aligning LLMs with Best-of-N Distillation", 2024, https://arxiv.org/abs/2407.14622; there 16
    fresh responses a prompt tell the reward's distribution under the anchor.

    Args:
        actors: The policy, reference and reward, as the data module names them.
        n: N of Best-of-N, any real number > 1; a whole one for the forward KL.
        divergence: ``backward``, ``forward`` or ``jeffreys``.
        second_term: Keep the second term of the reward ``log F_le + 1/(N-1) log sum_i (F_lt/F_le)^(i-1)``, without
            which Best-of-N is the optimum only where rewards do not tie and each response is rare.
        reference_samples: Responses a prompt sampled from the anchor at every step; 0 reads a reference table, for an
            anchor that stays.
        anchor_every: K, updates after which the anchor is replaced; 0 for an anchor that stays.
        **kwargs: What :class:`~vbon_lightning.modules.vbon.VBoN` takes.
    """

    def __init__(
        self,
        actors: ActorSpec,
        n: float = 4.0,
        divergence: Divergence = "jeffreys",
        second_term: bool = True,
        reference_samples: int = 16,
        anchor_every: int = 1000,
        **kwargs: Any,
    ) -> None:
        if not second_term and kwargs.get("bound", "exact") != "exact":
            raise ValueError("model.second_term=false is a target of its own: leave model.bound out")
        if not second_term and kwargs.get("log_ratio_floor") is not None:
            raise ValueError(
                "model.log_ratio_floor ends the tail of the exact log-ratio: leave it out, or set model.second_term to "
                "true"
            )
        if divergence == "forward":
            check_unused(type(self), "model.divergence=forward", second_term=second_term)
        self.second_term = second_term
        super().__init__(
            actors,
            n=n,
            divergence=divergence,
            reference_samples=reference_samples,
            anchor_every=anchor_every,
            **kwargs,
        )

    def record_settings(self, **settings: Any) -> None:
        """Record what is BOND's own, and what it has by default and others have not."""
        own = {"second_term": self.second_term, "divergence": self.divergence, "anchor_every": self.anchor_every}
        super().record_settings(**(own | settings))

    @property
    def target_is_exact(self) -> bool:
        """Return whether both terms of the reward are there."""
        return self.second_term and super().target_is_exact

    def target_of(self, log_reference: Tensor, cdf: RewardCDF) -> Target:
        """Return BOND's reward, and the KL's weight 1/(N - 1)."""
        if self.second_term:
            return super().target_of(log_reference, cdf)
        return bond_target(log_reference, cdf, n=self.current_n, second_term=False)

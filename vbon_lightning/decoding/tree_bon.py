"""TreeBoN: a tree of responses, grown from its better nodes."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from vbon_lightning.actors import Actors
from vbon_lightning.checks import check_without_effect
from vbon_lightning.decoding.base import Decoded, Decoder
from vbon_lightning.decoding.candidates import best_of
from vbon_lightning.decoding.further_models import FurtherModel
from vbon_lightning.decoding.growing import Grove, grove
from vbon_lightning.decoding.noise_key import NoiseKey
from vbon_lightning.decoding.options import check_counts
from vbon_lightning.functional import branch_places, implicit_reward
from vbon_lightning.models import ModelSpec
from vbon_lightning.sampling import response_log_probs
from vbon_lightning.sampling.towers import note_read
from vbon_lightning.types import PromptBatch


class TreeBoN(Decoder):
    """Grow n responses in layers; after each, branch the better of them; return the best of the last.

    J. Qiu et al., "TreeBoN: Enhancing Inference-Time Alignment with Speculative Tree-Search and Best-of-N Sampling"
    (2024): after each layer of ``longest / layers`` tokens the ``n / branches`` nodes with the highest partial score go
    on, each as several. The partial score is the implicit reward of a policy trained on preferences
    (:func:`~vbon_lightning.functional.implicit_reward`), or, where none is named, the reward of the response so far;
    the reward alone judges the whole responses. A node that has finished stays one leaf, and the places of its copies
    go to the next best node, so that n different leaves are judged. With one layer it is Best-of-N, of the same
    responses.

    Args:
        n: Nodes a layer, a multiple of ``branches``.
        layers: Layers, no more than there are tokens.
        branches: Copies of a node that goes on.
        preference_policy: A policy trained on preferences, such as a ``DPO`` export, whose implicit reward is the
            partial score.
    """

    needs_reward = True

    def __init__(
        self, n: int = 8, layers: int = 4, branches: int = 2, preference_policy: str | ModelSpec | None = None
    ) -> None:
        check_counts(n=n, layers=layers, branches=branches)
        if n % branches and layers > 1 < n:
            raise ValueError(f"n must be a multiple of branches, which {n} is not of {branches}")
        if layers == 1:
            of_layers = {"branches": branches, "preference_policy": preference_policy}
            check_without_effect(type(self), "layers=1", of_layers)
        if branches == 1:  # all nodes go on
            check_without_effect(type(self), "branches=1", {"layers": layers, "preference_policy": preference_policy})
        self.n: int = n
        self.layers, self.branches, self.rows = layers, branches, n
        if preference_policy is not None:
            self.models = (FurtherModel(preference_policy, "preference_policy"),)

    def check_fits(self, *, longest: int, max_rows: int | None) -> None:
        """Refuse more layers than there are tokens as well."""
        super().check_fits(longest=longest, max_rows=max_rows)
        if self.layers > longest:
            raise ValueError(f"layers is {self.layers}, and a response has at most {longest} tokens: ask for fewer")

    def decode(self, actors: Actors, prompts: PromptBatch, key: NoiseKey) -> Decoded:
        """Choose G responses a prompt."""
        longest = actors.max_new_tokens
        with grove(actors, prompts, n=self.n, key=key) as nodes:
            for layer in range(1, self.layers):
                nodes.growing.grow(longest * layer // self.layers)
                scores, finished = self._partial_scores(actors, nodes), nodes.growing.finished.view(nodes.shape)
                nodes.select(branch_places(scores, finished, branches=self.branches), own_noise=False)
            nodes.growing.grow()
            # Each branching makes a prefix stand in so many places at the most, and one of the last n is returned.
            bound = math.log(self.n) + (self.layers - 1) * math.log(self.branches)
            branched = self.n > 1 < self.layers and self.branches > 1
            return nodes.chosen(best_of(nodes.rewards()), kl_bound=bound if branched else None)

    def _partial_scores(self, actors: Actors, nodes: Grove) -> Tensor:
        """Return ``[B, G, n]``."""
        if not self.models:
            return nodes.rewards()
        responses, ours = nodes.responses(), nodes.growing.completions().log_probs
        preferring = self.models[0].load(actors)
        theirs = response_log_probs(preferring, nodes.prompts, responses, temperature=actors.temperature)
        read = int(nodes.prompts.mask.sum()) + int(responses.mask[..., :-1].sum())
        nodes.value_tokens += read
        note_read(preferring, read)
        return implicit_reward((theirs - ours).to(torch.float64), responses.mask).view(nodes.shape)

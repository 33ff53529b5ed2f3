"""What a policy, or Best-of-N itself, is worth on a set of prompts: plain numbers, each with its interval."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vbon_lightning.decoding import Decoded, DecodingCost
from vbon_lightning.evaluation.best_of_n import (
    KL_ESTIMATOR,
    bon_against_bon,
    bon_kl,
    selection_weights,
)
from vbon_lightning.evaluation.intervals import Estimate, estimate_mean
from vbon_lightning.functional import (
    RewardCDF,
    binned_bon_kl,
    bon_kl_bound,
    bon_win_rate,
    bon_win_rate_bound,
    win_rate_by_cdf,
)
from vbon_lightning.prefix_scorer import PrefixScorer
from vbon_lightning.types import PromptBatch, Rollout

Judge = Callable[[Rollout], Tensor]
"""Scores a rollout's responses ``[B, G]`` by a second scorer, one that no policy was trained against."""

BEST_OF_N = "Best-of-N"
"""The method of reports on Best-of-N itself."""
REFERENCE = "reference"
"""The method of the report on the reference, which is Best-of-1."""
PREDICTED_WIN_RATE = "the reference's rewards as the value model predicts them from the prompt: no table holds these"
PREDICTED_KL = "that of the rewards, as the value model predicts them from the prompt"


@dataclass
class PolicyReport:
    """A policy's numbers on a set of prompts: means over prompts with 95% intervals, KL in nats."""

    name: str
    """What it is called in tables and figures."""
    method: str
    """Its family, such as ``vBoN`` or ``KL-RL``; policies of one family look alike in the figure."""
    prompts: int
    samples: int
    """Responses a prompt the numbers come from."""
    reward: Estimate
    kl: Estimate
    """KL divergence from the reference over responses."""
    kl_estimator: str
    kl_check: Estimate | None = None
    """The same KL estimated in another way."""
    kl_check_estimator: str | None = None
    kl_is_bound: bool = False
    """Whether the KL is an upper bound."""
    kl_bound: float | None = None
    """For Best-of-N: ``log N - (N-1)/N``."""
    win_rate: Estimate | None = None
    """Against one reference sample, a tie counting half."""
    win_rate_bound: float | None = None
    """For Best-of-N: ``N / (N+1)``."""
    win_rate_vs_bon: dict[int, Estimate] = field(default_factory=dict)
    """Against Best-of-n, by n; 1/2 for a policy that equals it."""
    win_rate_estimator: str | None = None
    """By what the reference's rewards are known; None where the reference table holds them."""
    length: Estimate | None = None
    """Tokens a response, the EOS included."""
    finished: Estimate | None = None
    """Share of responses that ended with an EOS."""
    judge_reward: Estimate | None = None
    """By a second scorer that no policy was trained against."""
    n: int | None = None
    """N, for Best-of-N itself."""
    cost: dict[str, float] | None = None
    """What a response takes to make: tokens generated, discarded ones included, tokens that the value model or a tilted
    policy's tower reads, reward calls, and seconds, rewards included, of a batch shared by its responses; of a decoder
    also the most memory that a batch took."""
    missing: int = 0
    """Responses that have no reward and are left out of all of the above."""

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, ready for JSON."""
        plain = asdict(self)
        plain["win_rate_vs_bon"] = {str(n): value for n, value in plain["win_rate_vs_bon"].items()}
        return plain

    @classmethod
    def from_dict(cls, plain: dict[str, Any]) -> PolicyReport:
        """Make a report from :meth:`to_dict`'s values."""
        estimates = ("reward", "kl", "kl_check", "win_rate", "length", "finished", "judge_reward")
        values = dict(plain)
        for key in estimates:
            values[key] = None if values.get(key) is None else Estimate(**values[key])
        values["win_rate_vs_bon"] = {int(n): Estimate(**value) for n, value in plain.get("win_rate_vs_bon", {}).items()}
        return cls(**values)


class _Columns:
    """Collects one value a prompt under each name."""

    def __init__(self) -> None:
        self._parts: dict[str, list[Tensor]] = {}

    def add(self, name: str, values: Tensor, valid: Tensor, judged: Tensor | None = None) -> None:
        """Add prompts: ``[B]``, or ``[B, G]`` to be averaged over the responses that have a reward."""
        values, valid = values.detach().double().cpu(), valid.cpu()
        judged = torch.ones_like(values, dtype=torch.bool) if judged is None else judged.cpu()
        if values.ndim == 2:
            values = mean_of(values, judged)
        self._parts.setdefault(name, []).append(values[valid & judged.view(len(valid), -1).any(1)])

    def estimate(self, name: str) -> Estimate | None:
        found = torch.cat(self._parts.get(name, [torch.empty(0)]))
        return estimate_mean(found) if len(found) else None

    def need(self, name: str) -> Estimate:
        return estimate_mean(torch.cat(self._parts[name]))

    def __len__(self) -> int:
        return sum(len(part) for part in self._parts.get("reward", []))


def evaluate_policy(
    rollouts: Iterable[Rollout],
    *,
    name: str,
    method: str = "policy",
    n_values: Sequence[int] = (),
    judge: Judge | None = None,
    scorer: PrefixScorer | None = None,
    n: int | None = None,
) -> PolicyReport:
    """Average a policy's rollouts over prompts.

    The KL is the mean over responses of the exact KL over the vocabulary, summed over each response's tokens;
    the mean log-ratio of the sampled responses stands beside it as a check. Win rates are
    over the M reference rewards a prompt: unbiased for policies that never learnt from these very rewards, too high for
    others (``data.table_skip`` keeps some apart); where rollouts bring the predicted distribution of the reference's
    reward in their place, they are that distribution's.

    Args:
        rollouts: Rollouts with log-probabilities and KL filled in; filler rows count nowhere.
        name: What to call the policy.
        method: Its family.
        n_values: Which Best-of-n to compare with, each at most M; needs reference rewards or their prediction.
        judge: A second scorer.
        scorer: The value model that predicted the distributions.
        n: N, where the policy is Best-of-N itself: 1 for the reference.

    Raises:
        ValueError: If there is nothing to average, or reference rewards are missing where needed.
    """
    columns, samples, estimator, missing = _Columns(), 0, None, 0
    for rollout in rollouts:
        valid, mask, samples = rollout.prompts.valid, rollout.completions.mask, rollout.rewards.shape[1]
        log_ratio = rollout.log_probs.double() - rollout.reference_log_probs.double()
        judged = rollout.judged
        missing += int((~judged & valid[:, None]).sum())
        columns.add("reward", rollout.rewards, valid, judged)
        columns.add("kl", torch.where(mask, rollout.token_kl.double(), 0.0).sum(-1), valid, judged)
        columns.add("kl_check", torch.where(mask, log_ratio, 0.0).sum(-1), valid, judged)
        columns.add("length", mask.sum(-1), valid, judged)
        columns.add("finished", rollout.completions.finished, valid, judged)
        cdf = None
        if scorer is not None and rollout.reference_log_cdf is not None:
            known = rollout.rewards.double().nan_to_num(0.0)  # of one that is left out any number does
            cdf, estimator = scorer.reward_cdf(known, rollout.reference_log_cdf), PREDICTED_WIN_RATE
        won = win_rates(rollout.rewards, rollout.reference_rewards, cdf, n_values=n_values)
        for opponent, rates in won.items():
            columns.add(f"win_rate_{opponent}", rates, valid, judged)
        if n_values and not won:
            raise ValueError(
                f"win rates against Best-of-{max(n_values)} need reference rewards, but the rollouts of "
                f"{name!r} bring none: name a reference table, or a value model to predict them"
            )
        if judge is not None:
            scores = judge(rollout)
            columns.add("judge", scores, valid, judged & ~scores.isnan())
    if len(columns) == 0:
        raise ValueError(f"there are no prompts to evaluate {name!r} on")
    return PolicyReport(
        name=name,
        method=method,
        prompts=len(columns),
        samples=samples,
        reward=columns.need("reward"),
        kl=columns.need("kl"),
        kl_estimator="exact KL over the vocabulary at each token, summed over sampled responses",
        kl_check=columns.need("kl_check"),
        kl_check_estimator="mean log-ratio of the sampled responses",
        win_rate=columns.estimate("win_rate_1"),
        win_rate_vs_bon={
            other: value for other in sorted(n_values) if (value := columns.estimate(f"win_rate_{other}")) is not None
        },
        win_rate_estimator=estimator,
        length=columns.need("length"),
        finished=columns.need("finished"),
        judge_reward=columns.estimate("judge"),
        n=n,
        missing=missing,
    )


def mean_of(values: Tensor, judged: Tensor) -> Tensor:
    """Average each prompt's responses that have a reward: ``[B, G]`` to ``[B]``; NaN for a prompt without any.

    Args:
        values: ``[B, G]``.
        judged: ``[B, G]`` bool: which responses have one.
    """
    return torch.where(judged, values, 0.0).sum(-1) / judged.sum(-1)


def win_rates(
    rewards: Tensor, reference_rewards: Tensor | None, cdf: RewardCDF | None, *, n_values: Sequence[int]
) -> dict[int, Tensor]:
    """Compute the win rates of responses over the reference and over each Best-of-n, ``[B, G]`` by n.

    Args:
        rewards: ``[B, G]``.
        reference_rewards: ``[B, M]``, or None.
        cdf: Where the rewards lie among the reference's, in place of these.
        n_values: Each n; 1 comes without asking.

    Returns:
        Nothing where neither is known.

    Raises:
        ValueError: If an n is below 1 or above M.
    """
    opponents = sorted({1, *n_values})
    if reference_rewards is not None:
        _check_samples(n_values, reference_rewards.shape[1])
        return {n: bon_win_rate(rewards.double(), reference_rewards.double(), n=n) for n in opponents}
    return {} if cdf is None else {n: win_rate_by_cdf(cdf, n=n) for n in opponents}


_BOUNDED_KL = "not known, but at most log c, no response being more than c times as likely as under the reference"
_NO_KL = "0, for with these options it is a plain sample of the reference"
_DECODER_KL = "KL of the decoder's choice to the reference at each token, an upper bound where candidates are drawn"


class DecodedBatch(NamedTuple):
    """What a decoder chose for a batch of prompts, and what it is worth."""

    prompts: PromptBatch
    """B prompts, with reference rewards."""
    decoded: Decoded
    """``[B, G]`` responses."""
    texts: list[list[str]]
    rewards: Tensor
    """``[B, G]``."""
    judge_rewards: Tensor | None = None
    """``[B, G]`` a second scorer's rewards."""


def evaluate_decoder(
    batches: Iterable[DecodedBatch],
    *,
    name: str,
    method: str,
    n: float,
    n_values: Sequence[int] = (),
    scorer: PrefixScorer | None = None,
) -> PolicyReport:
    """Average what a decoder chose over prompts; see :func:`evaluate_policy`.

    The KL is that of its own next-token distributions where it knows them, or the bound that it gives; that of
    Best-of-N is from the table, or by the value model's prediction.

    Args:
        batches: What it chose; filler rows count nowhere.
        name: What to call it.
        method: Its family.
        n: N of the Best-of-N that it is, or aims at.
        n_values: Which Best-of-n to compare with.
        scorer: Predicts the reference's rewards where the prompts bring none.

    Raises:
        ValueError: If there is nothing to average, or reference rewards are missing.
    """
    columns, samples, responses, estimator = _Columns(), 0, 0, None
    cost, missing = DecodingCost(0, 0, 0), 0
    for batch in batches:
        valid, decoded, reference = batch.prompts.valid, batch.decoded, batch.prompts.reference_rewards
        samples = batch.rewards.shape[1]
        judged, rewards = ~batch.rewards.isnan(), batch.rewards.double().nan_to_num(0.0)
        missing += int((~judged & valid[:, None]).sum())
        cdf = log_cdf = None
        if reference is None:
            if scorer is None:
                raise ValueError(f"{name!r} is compared with the reference's rewards: name a reference table")
            log_cdf, estimator = scorer.log_cdf(batch.prompts), PREDICTED_WIN_RATE
            cdf = scorer.reward_cdf(rewards, log_cdf)
        if decoded.token_kl is not None:
            kl = decoded.token_kl.sum(-1)
        elif decoded.kl_bound is not None and math.isinf(decoded.kl_bound):
            raise ValueError(
                f"the decoder of {name!r} says nothing of its KL: give Decoded its token_kl, or as kl_bound log c, if "
                "no response is more than c times as likely as before (log n for any one of n samples); None stands "
                "for Best-of-N itself"
            )
        elif decoded.kl_bound is not None:
            kl = torch.full_like(rewards, decoded.kl_bound)
        elif log_cdf is not None and scorer is not None:
            kl = binned_bon_kl(log_cdf, scorer.bins, n=n)
        else:
            assert reference is not None
            kl = bon_kl(reference.double(), n=n)
        columns.add("reward", rewards, valid, judged)
        columns.add("kl", kl, valid, judged if kl.ndim == 2 else None)
        columns.add("length", decoded.mask.sum(-1), valid, judged)
        columns.add("finished", decoded.finished, valid, judged)
        for opponent, rates in win_rates(rewards, reference, cdf, n_values=n_values).items():
            columns.add(f"win_rate_{opponent}", rates, valid, judged)
        if batch.judge_rewards is not None:
            columns.add("judge", batch.judge_rewards, valid, judged & ~batch.judge_rewards.isnan())
        cost, responses = cost.plus(decoded.cost), responses + rewards.numel()
    if len(columns) == 0:
        raise ValueError(f"there are no prompts to evaluate {name!r} on")
    return PolicyReport(
        name=name,
        method=method,
        prompts=len(columns),
        samples=samples,
        reward=columns.need("reward"),
        kl=columns.need("kl"),
        kl_estimator=_kl_estimator(decoded, predicted=estimator is not None),
        kl_is_bound=decoded.token_kl is None and bool(decoded.kl_bound),  # a bound of 0 is the KL
        win_rate=columns.estimate("win_rate_1"),
        win_rate_vs_bon={
            other: value for other in sorted(n_values) if (value := columns.estimate(f"win_rate_{other}")) is not None
        },
        win_rate_estimator=estimator,
        length=columns.need("length"),
        finished=columns.need("finished"),
        judge_reward=columns.estimate("judge"),
        cost=cost.per_response(responses),
        missing=missing,
    )


def _kl_estimator(decoded: Decoded, *, predicted: bool) -> str:
    if decoded.token_kl is not None:
        return _DECODER_KL
    if decoded.kl_bound is not None:
        return _BOUNDED_KL if decoded.kl_bound else _NO_KL
    return PREDICTED_KL if predicted else KL_ESTIMATOR


@torch.no_grad()
def bon_reports(
    reference_rewards: Tensor,
    *,
    n_values: Sequence[int],
    lengths: Tensor | None = None,
    finished: Tensor | None = None,
    judge_rewards: Tensor | None = None,
) -> list[PolicyReport]:
    """Report on the reference and on Best-of-N for each N, from the reference table alone.

    Rewards, lengths and win rates are means over all n-subsets of the M cached responses, which is unbiased;
    see :func:`~vbon_lightning.evaluation.best_of_n.bon_kl` for the KL.

    Args:
        reference_rewards: ``[B, M]``.
        n_values: The N to report on; 1 is the reference, and comes first whether asked for or not.
        lengths: ``[B, M]`` tokens of each response.
        finished: ``[B, M]`` whether an EOS ended it.
        judge_rewards: ``[B, M]`` a second scorer's rewards.

    Raises:
        ValueError: If shapes differ or N > M.
    """
    rewards = reference_rewards.double()
    named = {"lengths": lengths, "finished": finished, "judge_rewards": judge_rewards}
    for name, values in named.items():
        if values is not None and values.shape != rewards.shape:
            raise ValueError(f"{name} must have the rewards' shape {tuple(rewards.shape)}, got {tuple(values.shape)}")
    wanted = sorted({1, *n_values})
    _check_samples(wanted, rewards.shape[1])
    return [_bon_report(rewards, n, wanted, lengths=lengths, finished=finished, judge=judge_rewards) for n in wanted]


def _bon_report(
    rewards: Tensor,
    n: int,
    opponents: Sequence[int],
    *,
    lengths: Tensor | None,
    finished: Tensor | None,
    judge: Tensor | None,
) -> PolicyReport:
    weights, samples = selection_weights(rewards, n=n), rewards.shape[1]

    def selected(values: Tensor | None) -> Estimate | None:
        if values is None:
            return None
        # What the judge says nothing of is left out.
        known, values = ~values.isnan(), values.double().nan_to_num(0.0)
        shares = torch.where(known, weights, 0.0)
        means = (shares * values).sum(-1) / torch.where(known.all(-1), 1.0, shares.sum(-1))
        return estimate_mean(means[known.any(-1)]) if known.any() else None

    def against(opponent: int) -> Estimate | None:
        if n + opponent > samples:
            return None
        return estimate_mean(bon_against_bon(rewards, n=n, m=opponent))

    return PolicyReport(
        name=REFERENCE if n == 1 else f"Best-of-{n}",
        method=REFERENCE if n == 1 else BEST_OF_N,
        prompts=rewards.shape[0],
        samples=samples,
        reward=estimate_mean((weights * rewards).sum(-1)),
        kl=estimate_mean(bon_kl(rewards, n=n)),
        kl_estimator=KL_ESTIMATOR,
        kl_bound=bon_kl_bound(n),
        win_rate=against(1),
        win_rate_bound=bon_win_rate_bound(n),
        win_rate_vs_bon={m: value for m in opponents if m > 1 and (value := against(m)) is not None},
        length=selected(lengths),
        finished=selected(finished),
        judge_reward=selected(judge),
        n=n,
    )


def _check_samples(n_values: Sequence[int], samples: int) -> None:
    if any(n < 1 for n in n_values):
        raise ValueError(f"Best-of-n needs n >= 1, got {list(n_values)}")
    if n_values and max(n_values) > samples:
        raise ValueError(
            f"Best-of-{max(n_values)} needs at least {max(n_values)} reference responses a prompt, but there "
            f"are {samples}: sample more of them or compare with a smaller n"
        )

"""Methods at equal budgets: what each keeps of Best-of-N's gain at Best-of-N's own KL, and what it cost."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import fmean

from results import Baseline, Result, grouped
from tables import first_seed_seconds, spread, table, training_cost

from vbon_lightning.evaluation import Estimate
from vbon_lightning.evaluation.fronts import gain_at, gain_share, hypervolume
from vbon_lightning.evaluation.intervals import estimate_over_seeds

_N = (2, 4, 8, 16)


def gain_table(runs: Sequence[Result], bon: Baseline) -> str:
    """What share of Best-of-N's gain each method has where its KL is Best-of-N's."""
    rows = []
    for title, own in grouped(runs, lambda run: run.title).items():
        seeds = list(grouped(own, lambda run: run.seed).values())
        cells = []
        for n in (n for n in _N if n in bon.win_rates):
            found = [read for seed in seeds if (read := _kept(seed, bon, n)) is not None]
            # Of a seed whose strengths are not all run yet nothing may be known so far out.
            some = f" ({len(found)} of {len(seeds)})" if len(found) < len(seeds) else ""
            cells.append(_percent(estimate_over_seeds(found)) + some if found else "not reached")
        rows.append([title, str(len(seeds)), str(len({run.value for run in own})), *cells])
    note = (
        "Share of Best-of-N's gain in win rate at the KL of that Best-of-N, read off a seed's runs: linear in the\n"
        "root of the KL between the two strengths next to it (the reference being one). Mean over seeds; half of the\n"
        "95% interval, over seeds and over the prompts, which are the same for all. In brackets, how many of the\n"
        "seeds reach that KL."
    )
    header = ["method", "seeds", "strengths", *(f"N = {n}" for n in _N if n in bon.win_rates)]
    return table(header, rows, note)


def _kept(runs: Sequence[Result], bon: Baseline, n: int) -> Estimate | None:
    kl, best = bon.kls[n], bon.win_rates[n]
    height = gain_at([(run.kl, run.win_rate) for run in runs], kl)
    if math.isnan(height):
        return None
    nearest = min(runs, key=lambda run: abs(run.kl - kl)).report.win_rate
    assert nearest is not None
    half = None if nearest.half_width is None else nearest.half_width / (best - 0.5)
    return Estimate(gain_share(height, best), half)


def _percent(estimate: Estimate) -> str:
    half = "" if estimate.half_width is None else f" ± {100 * estimate.half_width:.0f}"
    return f"{100 * estimate.mean:.0f}{half}%"


def family_table(runs: Sequence[Result], bon: Baseline) -> str:
    """What share of Best-of-N's gain single runs keep, each at its own KL."""
    curve = [(bon.kls[n], rate) for n, rate in bon.win_rates.items()]
    rows = []

    def order(run: Result) -> tuple[bool, float]:
        share = _share_at_its_kl(run, curve)
        return math.isnan(share), -share  # what cannot be compared comes last

    for run in sorted(runs, key=order):
        share, report = _share_at_its_kl(run, curve), run.report
        assert report.win_rate is not None
        cost = training_cost(run, bon)
        cells = [str(report.kl), str(report.win_rate), "-" if math.isnan(share) else f"{100 * share:.0f}%"]
        rows.append([run.title, run.strength, *cells, f"{cost.sampled:,}", f"{cost.cached:,}"])
    note = (
        "Seed 0, 96 held-out prompts x 32 responses; *gain kept* is the share of the gain in win rate that Best-of-N\n"
        "has at the row's own KL, - for one further from the reference than any Best-of-N; intervals are over\n"
        "prompts. Sampled responses are the policy's and those of its anchor."
    )
    header = ["method", "strength", "KL (nats)", "win rate", "gain kept", "sampled", "of the table"]
    return table(header, rows, note, words=2)


def _share_at_its_kl(run: Result, curve: Sequence[tuple[float, float]]) -> float:
    best = gain_at(curve, max(run.kl, 0.0))
    return gain_share(run.win_rate, best) if best > 0.5 else math.nan


def corners_table(runs: Sequence[Result], bon: Baseline) -> str:
    """Area that each method's runs dominate, up to several KLs, as a share of Best-of-N's."""
    corners = {n: bon.kls[n] for n in (4, 8, 16, 32) if n in bon.kls}
    best = [(bon.kls[n], rate) for n, rate in bon.win_rates.items()]
    whole = {n: hypervolume(best, reference=(kl, 0.5)) for n, kl in corners.items()}
    rows = []
    for title, own in grouped(runs, lambda run: run.title).items():
        seeds = grouped(own, lambda run: run.seed).values()
        cells = []
        for n, kl in corners.items():
            areas = [hypervolume([(r.kl, r.win_rate) for r in seed], reference=(kl, 0.5)) / whole[n] for seed in seeds]
            cells.append(spread(areas, 2))
        rows.append([title, *cells])
    note = (
        "Area between the runs of one seed and the corner at the KL of that Best-of-N and a win rate of 1/2, as a\n"
        "share of the area of Best-of-N's own runs (N = 2, 4, 8, ...): mean over seeds, and range. It favours who has\n"
        "more runs below the corner."
    )
    return table(["method", *(f"up to N = {n}, {kl:.2f} nats" for n, kl in corners.items())], rows, note)


def costs_table(runs: Sequence[Result], bon: Baseline) -> str:
    """What a policy of each method cost, the stages before it and the table included."""
    second = bon.table["seconds_per_response"] or 0.0
    rows = []
    for title, own in grouped(runs, lambda run: run.title).items():
        costs = [training_cost(run, bon) for run in own]
        cached, sampled, updates, _ = (fmean(values) for values in zip(*costs, strict=True))
        seconds = first_seed_seconds(own, costs) + cached * second
        # Runs of one command are one training, dialled.
        trainings = len({run.training["command"] for run in own})
        whole = seconds * trainings / len({run.seed for run in own})
        rows.append([title, *(f"{number:,.0f}" for number in (cached, sampled, updates, seconds, whole))])
    note = (
        "A policy, mean over strengths and seeds: responses of the table that it learns from, responses that it\n"
        f"sampled (all of both scored), updates, and, of the first seed, seconds on one core with {second:.2g} a\n"
        "response of the table.\n"
        "The last column is all strengths of a seed, for which a policy that is dialled is trained once."
    )
    header = ["method", "from the table", "sampled", "updates", "seconds a policy", "seconds all strengths"]
    return table(header, rows, note)

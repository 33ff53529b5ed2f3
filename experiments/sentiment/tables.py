"""The report's tables, each a function from results to Markdown."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from statistics import fmean
from typing import Any, NamedTuple

from results import SYMBOLS, Baseline, Result, grouped

from vbon_lightning._markdown import markdown_table
from vbon_lightning.evaluation.fronts import (
    break_even,
    equivalent_n,
    front_shares,
    gain_share,
)

Gain = Callable[[Result], float]


def spread(values: Sequence[float], digits: int = 3) -> str:
    """Format the mean over seeds and, where there are several, the range."""
    shown = [f"{value:.{digits}f}" for value in (fmean(values), min(values), max(values))]
    mean, low, high = [text.removeprefix("-") if float(text) == 0 else text for text in shown]
    return mean if len(values) == 1 else f"{mean} ({low} to {high})"


def table(header: list[str], rows: list[list[str]], note: str, *, words: int = 1) -> str:
    """Format a table whose first ``words`` columns are text, and a note below."""
    return markdown_table(header, rows, align="l" * words + "r" * (len(header) - words)) + f"\n{note}\n"


def front_table(runs: Sequence[Result]) -> str:
    """Share of each method's runs on the Pareto front of all runs."""
    by_method = grouped(runs, lambda run: run.title)

    def shares(gain: Gain) -> dict[str, float]:
        return front_shares({title: [(run.kl, gain(run)) for run in own] for title, own in by_method.items()})

    win, reward = shares(lambda run: run.win_rate), shares(lambda run: run.reward)
    rows = [[t, str(len(own)), f"{win[t]:.0%}", f"{reward[t]:.0%}"] for t, own in by_method.items()]
    note = (
        "Share of a method's runs (all strengths and seeds) that no run of any method dominates: none has at most its\n"
        "KL and at least its gain, one of the two better. Best-of-N itself takes no part."
    )
    return table(["method", "runs", "front of win rate and KL", "front of reward and KL"], rows, note)


def closeness_table(runs: Sequence[Result], bon: Baseline) -> str:
    """How close the policies trained for N come to Best-of-N."""
    rows = []
    for (title, n), own in grouped([r for r in runs if r.short == "n"], lambda r: (r.title, r.value)).items():
        if n not in bon.win_rates:
            continue
        best, kl = bon.win_rates[n], bon.kls[n]
        kept = [gain_share(run.win_rate, best) for run in own]
        cells = [spread([run.win_rate for run in own]), f"{best:.3f}", spread(kept, 2)]
        rows.append([title, f"{n:g}", *cells, spread([run.kl / kl for run in own], 2), str(len(own))])
    note = (
        "Gain kept: (win rate - 1/2) / (Best-of-N's win rate - 1/2), with Best-of-N as measured on the same prompts.\n"
        "Mean over seeds, and range."
    )
    header = ["method", "N", "win rate", "Best-of-N's", "gain kept", "KL / Best-of-N's KL", "seeds"]
    return table(header, rows, note)


def paired_table(ones: Sequence[Result], others: Sequence[Result]) -> str:
    """Differences of two methods, both with runs, at the same strength and seed."""
    partner = {(run.value, run.seed): run for run in others}
    pairs = [(run, partner[run.value, run.seed]) for run in ones if (run.value, run.seed) in partner]
    rows = []
    for value in dict.fromkeys(one.value for one, _ in pairs):
        own = [(one, other) for one, other in pairs if one.value == value]

        def difference(of: Gain, own: list[tuple[Result, Result]] = own) -> str:
            return spread([of(one) - of(other) for one, other in own])

        rows.append(
            [
                f"{value:g}",
                difference(lambda run: run.win_rate),
                difference(lambda run: run.reward),
                difference(lambda run: run.kl),
                f"{sum(one.win_rate > other.win_rate for one, other in own)} of {len(own)}",
            ]
        )
    symbol = SYMBOLS.get(ones[0].short, ones[0].short)
    note = f"{ones[0].title} less {others[0].title} at the same {symbol} and seed: mean over seeds, and range."
    return table([symbol, "win rate", "reward", "KL", "win rate higher in"], rows, note)


def samples_table(runs: Sequence[Result]) -> str:
    """Effect of M, the reference rewards a prompt."""
    rows = [
        [f"{m:g}", *(spread([of(run) for run in own]) for of in (win_rate, reward, kl)), str(len(own))]
        for m, own in grouped(runs, lambda run: run.value).items()
    ]
    note = "M reference rewards a prompt, the first of the table's. Mean over seeds, and range."
    return table(["M", "win rate", "reward", "KL", "seeds"], rows, note)


def budget_table(runs: Sequence[Result]) -> str:
    """Effect of the number of sampled responses, at the strengths that were trained with several numbers of them."""
    by_strength = grouped(runs, lambda run: run.value)
    varied = [
        run
        for own in by_strength.values()
        if len({run.training["sampled_responses"] for run in own}) > 1
        for run in sorted(own, key=lambda run: run.training["sampled_responses"])
    ]
    rows = [
        [
            f"{count:,.0f}",
            run.strength,
            f"{run.training['settings']['optimizer']['optimizer']['lr']:g}",
            str(run.seed),
            *(str(number) for number in (run.report.win_rate, run.report.reward, run.report.kl)),
        ]
        for run in varied
        for count in [run.training["sampled_responses"]]
    ]
    note = "The learning rate falls linearly to 0, and is as much higher as there are fewer steps: the way is as long."
    return table(["responses", "strength", "learning rate", "seed", "win rate", "reward", "KL"], rows, note)


class TrainingCost(NamedTuple):
    """What a policy took, the stages before it included."""

    cached: float
    """Responses of the reference table; the stages read the same ones."""
    sampled: float
    updates: float
    seconds: float


def training_cost(run: Result, bon: Baseline) -> TrainingCost:
    """Add up what a run and the trainings that it started from took."""
    chain: list[dict[str, Any]] = [run.training]
    while (before := chain[-1].get("after")) is not None:
        chain.append(before)
    whole = bon.table["training_responses"] if run.table else 0
    return TrainingCost(
        max(stage.get("table_responses", whole) for stage in chain),
        *(sum(stage[key] for stage in chain) for key in ("sampled_responses", "optimizer_steps", "seconds")),
    )


def first_seed_seconds(runs: Sequence[Result], costs: Sequence[TrainingCost]) -> float:
    """Return the mean seconds of the first seed's runs: other seeds may have run on other machines."""
    first = min(run.seed for run in runs)
    return fmean(cost.seconds for run, cost in zip(runs, costs, strict=True) if run.seed == first)


def break_even_table(runs: Sequence[Result], bon: Baseline) -> str:
    """After how many queries training has paid for itself."""
    second, largest, rows = bon.table["seconds_per_response"], max(bon.win_rates), []
    for (title, strength), own in grouped(runs, lambda run: (run.title, run.strength)).items():
        costs = [training_cost(run, bon) for run in own]
        responses = fmean(cost.sampled + cost.cached for cost in costs)
        cached = fmean(cost.cached for cost in costs)
        seconds = None if second is None else first_seed_seconds(own, costs) + cached * second
        n = equivalent_n(fmean(run.win_rate for run in own), bon.win_rates)
        above = math.isinf(n)
        n = float(largest) if above else n
        queries = _queries(break_even(responses, n=n), above)
        timed = "-" if seconds is None else _queries(break_even(seconds, n=n, response_cost=second), above)
        cost = "-" if seconds is None else f"{seconds:.0f}"
        rows.append(
            [f"{title} {strength}", f"{'> ' if above else ''}{n:.1f}", f"{responses:,.0f}", queries, cost, timed]
        )
    speed = "-" if second is None else f"{second:.2g}"
    note = (
        "Queries after which training has paid for itself: cost of training / ((N - 1) x cost of a response), since a\n"
        "query costs N responses with Best-of-N and one with the policy. N is that of the Best-of-N with the policy's\n"
        "win rate (linear in log N between the measured ones; means over seeds). The cost of training is what it and\n"
        "the stages before it sampled, and the part of the reference table that they read; in seconds, their wall\n"
        f"time in the first seed, and {speed} seconds a response, measured while the table was made\n"
        f"({bon.table['device']}). Gradients count in seconds only."
    )
    header = ["policy", "N it replaces", "responses", "queries, by responses", "seconds", "queries, by seconds"]
    return table(header, rows, note)


def runs_table(runs: Sequence[Result]) -> str:
    """All runs."""
    rows = []
    for run in runs:
        training, judge = run.training, run.report.judge_reward
        numbers = [run.report.win_rate, run.report.reward, run.report.kl, judge]
        cells = ["-" if number is None else str(number) for number in numbers]
        costs = [f"{training[key]:,.0f}" for key in ("seconds", "optimizer_steps", "sampled_responses")]
        rows.append([run.title, run.group, run.setting, run.strength, str(run.seed), *cells, *costs])
    header = ["method", "group", "setting", "strength", "seed", "win rate", "reward", "KL", "judge's reward"]
    header += ["seconds", "steps", "responses"]
    note = "Means over prompts ± half of the 95% interval."
    if any(run.group == "family" for run in runs):
        note += " The family group was trained beside other work on the machine: its seconds\nsay little."
    return table(header, rows, note, words=4)


def win_rate(run: Result) -> float:
    """Return the win rate of a run."""
    return run.win_rate


def reward(run: Result) -> float:
    """Return the reward of a run."""
    return run.reward


def kl(run: Result) -> float:
    """Return the KL of a run."""
    return run.kl


def _queries(count: float, upper: bool) -> str:
    return "never" if math.isinf(count) else f"{'< ' if upper else ''}{count:,.0f}"

"""The ``vbon compare`` command: exported policies, the reference and Best-of-N itself on held-out prompts."""

from __future__ import annotations

import json
import math
import shlex
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch.loggers import Logger
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from vbon_lightning._visible import visible
from vbon_lightning.actors import Actors
from vbon_lightning.commands.parsers import ArgumentParser, description_of, parse_beside_run, pass_over_run
from vbon_lightning.data import AlignmentDataModule
from vbon_lightning.data.encoding import EncodedPrompt
from vbon_lightning.decoding import Decoder
from vbon_lightning.decoding.drawing import device_named, on_device
from vbon_lightning.evaluation.cards import write_cards
from vbon_lightning.evaluation.costs import sample_cost, scoring_seconds, timed_sampling
from vbon_lightning.evaluation.guards import (
    check_decoder,
    check_methods,
    check_names,
    check_numbers,
    check_policy,
    make_directory,
)
from vbon_lightning.evaluation.predicted import predicted_bon_reports
from vbon_lightning.evaluation.reports import (
    REFERENCE,
    DecodedBatch,
    Judge,
    PolicyReport,
    bon_reports,
    evaluate_decoder,
    evaluate_policy,
)
from vbon_lightning.evaluation.temperatures import TemperatureReport, evaluate_temperature, write_temperatures
from vbon_lightning.evaluation.texts import text_samples
from vbon_lightning.evaluation.writing import comparison_markdown, write_comparison
from vbon_lightning.models import (
    ModelSpec,
    as_spec,
    load_causal_lm,
    locate,
    vocabulary_size,
)
from vbon_lightning.paths import PACKAGE_PREFIX
from vbon_lightning.reference_table import ReferenceTableError
from vbon_lightning.rewards import RewardCalls, RewardModel
from vbon_lightning.rewards.calls import CallRecord, RewardCaller
from vbon_lightning.types import Completions, PromptBatch, Rollout

Split = Literal["train", "val", "test"]


@torch.no_grad()
def compare(
    data: AlignmentDataModule,
    policies: dict[str, str | ModelSpec] = {},  # noqa: B006 (never mutated)
    decoders: dict[str, Decoder] = {},  # noqa: B006 (never mutated)
    methods: dict[str, str] = {},  # noqa: B006 (never mutated)
    output: str = "runs/comparison",
    n: list[int] = [2, 4, 8],  # noqa: B006 (never mutated)
    samples: int = 16,
    split: Split = "test",
    title: str = "Best-of-N and policies aligned to it",
    judge: RewardModel | None = None,
    temperatures: list[float] = [],  # noqa: B006 (never mutated)
    judge_table: bool = True,
    shown_prompts: int = 6,
    shown_samples: int = 1,
    seed: int = 0,
    device: str = "auto",
    cards: bool = True,
    logger: bool | Logger | list[Logger] = True,
    command: str | None = None,
) -> list[PolicyReport]:
    """Evaluate exported policies, the reference and Best-of-N on held-out prompts.

    Writes ``comparison.json``, ``comparison.md``, ``pareto.png``, ``cost.png`` and ``samples.md`` into ``output`` and
    logs them.
    Policies are sampled afresh; Best-of-N and all win rates come from the reference table, or, where none is named,
    from the distribution of the reward that a value model predicts from each prompt. The reference is then sampled as
    well: its win rate, 1/2 were the prediction right, says how far to trust the others.

    Args:
        data: The prompts, the reference, the reward, and the table that holds the prompts' reference responses or the
            value model that stands in for it.
        policies: Directory (or hub name) of each policy, or a mapping as for ``data.policy``, by the name to show.
        decoders: Ways to decode from the reference to compare with, by the name to show.
        methods: Method of policies and decoders by their names; the first word of a name where nothing is said. Those
            of one method look alike in the pictures.
        output: Directory to write to.
        n: Which Best-of-N to show and to compare with.
        samples: Responses sampled a prompt and policy.
        split: Which of the data's splits has the held-out prompts.
        title: Title of the table and the picture.
        judge: A second reward, one that no policy was trained against and no decoder chooses by.
        temperatures: Also sample the reference and the policies, not the decoders, at each of these temperatures and
            report reward and win rate over the reference at its own (``temperatures.json``, ``.md`` and ``.png``).
        judge_table: Whether the judge scores the table's responses too, for the reference and Best-of-N: the same at
            every comparison, and many.
        shown_prompts: How many prompts to show with their responses.
        shown_samples: How many responses a policy to show.
        seed: Seeds the sampling; policies share their noise.
        device: ``cpu``, ``cuda``, ... or ``auto``.
        cards: Whether the model cards of exports that are compared get the results, in place of earlier ones.
        logger: Where the table, the picture and the texts go too: TensorBoard in ``output`` by default; false for
            nowhere, or one or several of Lightning's loggers, as for ``Trainer``.
        command: The command to print with the table.
    """
    if not policies and not decoders:
        raise ValueError("name at least one policy to compare: --policies.NAME DIRECTORY")
    check_names(policies, decoders)
    check_methods(methods, [*policies, *decoders])
    method_of = {name: methods.get(name, name.split()[0]) for name in (*policies, *decoders)}
    check_numbers(n=n, samples=samples, shown_prompts=shown_prompts, shown_samples=shown_samples)
    if any(not 0 < temperature < math.inf for temperature in temperatures):
        raise ValueError(f"temperatures must be positive and finite, got {temperatures}")
    place = device_named(device)
    spec = data.actors
    data.judge_columns = [] if judge is None else list(judge.columns)
    prompts = data.prompts(split)
    rewards = None
    if data.reference_table is not None:
        rewards = data.table_rewards(prompts)  # refuses prompts without a row before any model is loaded
        if max(n, default=1) > rewards.shape[1]:
            raise ValueError(f"n={max(n)} needs as many reference responses a prompt; the table has {rewards.shape[1]}")
    elif spec.value_model is None:
        raise ValueError(
            "nothing says what the reference's rewards are: name a reference table (data.reference_table), or for "
            "prompts that none holds a value model (data.value_model)"
        )
    for name, path in policies.items():
        check_policy(name, path, data.tokenizer)
    for name, decoder in decoders.items():
        check_decoder(name, decoder, spec, data.tokenizer)

    actors = Actors.load(
        spec.replaced(policy=spec.reference_spec, reference=None),
        trainable=False,
        reference=False,
        value=rewards is None or any(decoder.needs_value_model for decoder in decoders.values()),
    )
    if rewards is not None:
        data.table().check_tokens(vocabulary_size(actors.policy), actors.end_ids)
    _move(actors.policy, place)
    if judge is not None and hasattr(judge, "to"):  # any callable with the protocol's words will do
        judge.to(place)
    actors.reference = actors.policy
    judged = None if judge is None else _judge(actors, judge)
    scorer = actors.value if rewards is None else None

    # Each batch prompts x samples rows; the loader is rebuilt for every policy, so that all see the same batches.
    def batches(label: str, limit: int | None = None) -> Iterator[PromptBatch]:
        loader = data.split_dataloader(split)
        for done, batch in enumerate(tqdm(loader, desc=visible(label), leave=False, disable=limit is not None)):
            if limit is not None and done * data.eval_batch_size >= limit:
                return
            yield on_device(batch, place)

    noise: dict[str, Any] = {"seed": seed, "stream": "compare", "step": 0}

    def rollouts(label: str, number: int, limit: int | None = None) -> Iterator[Rollout]:
        return (actors.rollout(batch, num_samples=number, **noise) for batch in batches(label, limit))

    by_temperature: list[TemperatureReport] = []

    def at_temperatures(name: str) -> None:
        for temperature in temperatures:
            actors.temperature = temperature
            drawn = batches(f"{name}, T = {temperature:g}")
            found = (actors.scored_responses(batch, num_samples=samples, **noise) for batch in drawn)
            by_temperature.append(evaluate_temperature(found, name=name, temperature=temperature, scorer=scorer))
        actors.temperature = spec.temperature

    shown: dict[str, list[Rollout]] = {"reference": list(rollouts("reference", shown_samples, shown_prompts))}
    at_temperatures("reference")
    last: list[tuple[PromptBatch, Completions]] = []  # of the reference, to time what scoring takes
    if rewards is not None:
        reports = _best_of_n(data, prompts, rewards, n, judge if judge_table else None)
        with timed_sampling(actors) as watch:  # as policies are sampled, for what that takes alone
            for batch in batches("reference"):
                last[:] = [(batch, actors.sample(actors.policy, batch, num_samples=samples, **noise))]
    else:
        assert scorer is not None
        predicted: list[Tensor] = []
        with timed_sampling(actors) as watch:
            reports = [
                evaluate_policy(
                    _keep_predictions(rollouts("reference", samples), predicted, last),
                    name="reference",
                    method=REFERENCE,
                    n_values=n,
                    judge=judged,
                    scorer=scorer,
                    n=1,
                )
            ]
        reports += predicted_bon_reports(torch.cat(predicted), scorer.bins, n_values=n)
    scoring = scoring_seconds(actors, *last[0])
    for report in reports:
        report.cost = sample_cost(
            reports[0].length,
            watch.seconds_a_response,
            n=report.n or 1,
            scoring=scoring,
            value_tokens=watch.tower_tokens_a_response,
        )
    for name, decoder in decoders.items():
        found: list[DecodedBatch] = []
        for batch in tqdm(data.split_dataloader(split), desc=visible(name), leave=False):
            found.append(_decode(actors, decoder, on_device(batch, place), judge, samples=samples, seed=seed))
        decoder.release()  # the next one's models take its place
        reports.append(
            evaluate_decoder(found, name=name, method=method_of[name], n=decoder.n, n_values=n, scorer=scorer)
        )
    for name, path in policies.items():
        actors.policy = _move(load_causal_lm(as_spec(path), trainable=False), place)
        kept: list[Rollout] = []
        with timed_sampling(actors) as watch:
            report = evaluate_policy(
                _keep(rollouts(name, samples), kept, shown_prompts),
                name=name,
                method=method_of[name],
                n_values=n,
                judge=judged,
                scorer=scorer,
            )
        report.cost = sample_cost(report.length, watch.seconds_a_response, value_tokens=watch.tower_tokens_a_response)
        reports.append(report)
        shown[name] = kept
        at_temperatures(name)
    files = write_comparison(
        reports,
        output,
        title=title,
        command=command,
        samples=text_samples(shown, prompts=shown_prompts, samples=shown_samples),
        logger=logger,
    )
    if by_temperature:
        files |= write_temperatures(by_temperature, output, title=title, trained_at=spec.temperature)
    print(comparison_markdown(reports, title=title, command=command))
    written = list(files.values())
    if cards:
        directories = {name: _directory(model) for name, model in policies.items()}
        exports = {name: directory for name, directory in directories.items() if directory is not None}
        written += write_cards(
            reports, exports, dataset=_dataset(data, split), split=split, settings=_settings(data, seed, judge)
        )
    print(visible("\n".join(f"wrote {path}" for path in written)))
    return reports


def _directory(model: str | ModelSpec) -> str | None:
    """Return the directory that a policy lies in, None for one of the hub or of an installed package."""
    name = as_spec(model).name
    if name is None or str(name).startswith(PACKAGE_PREFIX):
        return None
    place, _ = locate("policies", str(name))
    return place if Path(place).is_dir() else None


def _dataset(data: AlignmentDataModule, split: Split) -> str:
    """Return the name of a split's data; of a path, the last name alone."""
    source = data.sources[split]
    assert source is not None
    return source.public_name[0]


def _settings(data: AlignmentDataModule, seed: int, judge: RewardModel | None) -> dict[str, str]:
    spec = data.actors
    scorers = {"reward": spec.reward, "judge": judge}
    return {
        "longest response": f"{spec.max_new_tokens} tokens",
        "temperature": f"{spec.temperature:g}",
        **{name: json.dumps(one.identity(), sort_keys=True) for name, one in scorers.items() if one is not None},
        "win rates by": "a value model's prediction"
        if data.reference_table is None
        else "the reference table's rewards",
        "seed": str(seed),
    }


def _decode(
    actors: Actors, decoder: Decoder, batch: PromptBatch, judge: RewardModel | None, *, samples: int, seed: int
) -> DecodedBatch:
    decoded = decoder(actors, batch, num_samples=samples, seed=seed, stream="compare", step=0)
    ids = actors.token_ids(decoded)
    texts = actors.decode(ids, batch)
    known = decoded.rewards
    rewards = actors.score(batch, texts, ids, decoded.finished) if known is None else known
    judged = None if judge is None else _judged(judge, actors.reward_calls, actors.record, batch, texts, ids)
    return DecodedBatch(batch, decoded, texts, rewards, judged)


def _best_of_n(
    data: AlignmentDataModule,
    prompts: list[EncodedPrompt],
    rewards: Tensor,
    n: Sequence[int],
    judge: RewardModel | None,
) -> list[PolicyReport]:
    """Report on the reference and on Best-of-N from the table."""
    table, used = data.table(), data.table_columns
    keys, texts = [prompt.key for prompt in prompts], [prompt.text for prompt in prompts]
    rows = [table.row(key, text) for key, text in zip(keys, texts, strict=True)]
    lengths = torch.tensor([[len(ids) for ids in row.response_tokens[used]] for row in rows])
    finished = judged = None
    with suppress(ReferenceTableError):  # imported tables do not know them
        finished = table.finished_matrix(keys, texts)[:, used]
    if judge is not None:
        responses = [list(row.responses[used]) for row in rows]
        ids = [[list(tokens) for tokens in row.response_tokens[used]] for row in rows]
        judged = _judged(judge, data.actors.reward_calls, CallRecord(), data.prompt_batch(prompts), responses, ids)
    return bon_reports(rewards, n_values=n, lengths=lengths, finished=finished, judge_rewards=judged)


def _judge(actors: Actors, judge: RewardModel) -> Judge:
    def score(rollout: Rollout) -> Tensor:
        ids = actors.token_ids(rollout.completions)
        return _judged(judge, actors.reward_calls, actors.record, rollout.prompts, rollout.responses, ids)

    return score


def _judged(
    judge: RewardModel,
    calls: RewardCalls,
    record: CallRecord,
    prompts: PromptBatch,
    texts: list[list[str]],
    ids: list[list[list[int]]],
) -> Tensor:
    """Return the judge's rewards of responses, ``[B, G]``, on the prompts' device."""
    with RewardCaller(judge, calls, record, ahead=False) as caller:
        scores = caller.start(prompts.text, texts, ids, prompts.beside).result().rewards
    return scores.to(prompts.tokens.device)


def _keep(rollouts: Iterator[Rollout], kept: list[Rollout], prompts: int) -> Iterator[Rollout]:
    """Pass rollouts on, keeping the first few for the samples."""
    for rollout in rollouts:
        if sum(len(part.responses) for part in kept) < prompts:
            kept.append(rollout)
        yield rollout


def _keep_predictions(
    rollouts: Iterator[Rollout], kept: list[Tensor], last: list[tuple[PromptBatch, Completions]]
) -> Iterator[Rollout]:
    """Pass rollouts on, keeping the predicted distribution of each prompt's reward, and the last responses."""
    for rollout in rollouts:
        last[:] = [(rollout.prompts, rollout.completions)]
        assert rollout.reference_log_cdf is not None
        kept.append(rollout.reference_log_cdf[rollout.prompts.valid])
        yield rollout


def _move(model: PreTrainedModel, device: torch.device) -> PreTrainedModel:
    torch.nn.Module.to(model, device)
    return model


def build_parser() -> ArgumentParser:
    """Return the parser of ``vbon compare``."""
    parser = ArgumentParser(prog="vbon compare", description=description_of(compare))
    parser.add_argument(
        "-c", "--config", action="config", help="Path to a YAML file with these options, or that of a run."
    )
    pass_over_run(parser)
    parser.add_function_arguments(compare, skip={"command"})
    return parser


def main(args: Sequence[str]) -> None:
    """Parse the arguments of ``vbon compare`` and run it."""
    values = parse_beside_run(build_parser(), args)
    make_directory(values["output"])
    compare(**values, command="vbon compare " + shlex.join(args))

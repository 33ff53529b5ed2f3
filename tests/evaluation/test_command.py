"""`vbon compare` with a judge, on a tiny model and table."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from torch import Tensor

from tests.data.test_module import ALPHABET, Lengths, write_table
from tests.helpers import save_tiny_model
from tests.models.setting import save_value_model
from tests.sampling.test_decode import batch_of
from vbon_lightning.actors import Actors, ActorSpec
from vbon_lightning.data import AlignmentDataModule
from vbon_lightning.data.sources import TextSource
from vbon_lightning.decoding import BestOfN, DeRa, SpeculativeRejection, TreeBoN, ValueGuided
from vbon_lightning.evaluation import PolicyReport, command, logs, pareto_figure
from vbon_lightning.evaluation.command import compare
from vbon_lightning.functional import binned_bon_kl, binned_bon_reward, binned_reward_cdf, bon_win_rate
from vbon_lightning.models import ModelError, ModelSpec
from vbon_lightning.reference_table import ReferenceTable, ReferenceTableError
from vbon_lightning.rewards import RewardCalls


class Counting(Lengths):
    """A judge that knows how many responses it has scored."""

    scored = 0
    place: Any = None

    def to(self, device: Any) -> Counting:
        self.place = device
        return self

    def __call__(self, prompts: Any, responses: Any, token_ids: Any) -> Tensor:
        self.scored += sum(len(row) for row in responses)
        return super().__call__(prompts, responses, token_ids)


@pytest.mark.parametrize("judge_table", [True, False])
@pytest.mark.parametrize("table_samples", [None, 4])
def test_the_judge_of_the_table(tmp_path: Path, judge_table: bool, table_samples: int | None) -> None:
    model = save_tiny_model(tmp_path / "model", alphabet=ALPHABET)
    prompts = ["ab", "cde", "f"]
    (tmp_path / "test.txt").write_text("".join(f"{text}\n" for text in prompts))
    data = AlignmentDataModule(
        policy=model,
        reward=Lengths(),
        test=TextSource(path=str(tmp_path / "test.txt")),
        reference_table=str(tmp_path / "table"),
        table_samples=table_samples,
        max_new_tokens=4,
    )
    write_table(data, prompts, samples=6)
    judge = Counting()
    reports = compare(
        data,
        {"mine": str(model)},
        output=str(tmp_path / "out"),
        n=[2],
        samples=5,
        judge=judge,
        judge_table=judge_table,
        device="cpu",
    )
    assert [report.name for report in reports] == ["reference", "Best-of-2", "mine"]
    assert [report.judge_reward is not None for report in reports] == [judge_table, judge_table, True]
    held = table_samples or 6
    assert reports[0].samples == held
    assert judge.scored == 3 * 5 + (3 * held if judge_table else 0)
    assert judge.place == torch.device("cpu"), "it scores where the policies are"


def test_what_the_judge_says_comes_to_the_prompts_device(tmp_path: Path) -> None:
    """Whatever device it answers from: "meta" stands for a GPU."""
    save_tiny_model(tmp_path / "model", alphabet=ALPHABET)
    spec = ActorSpec(policy=str(tmp_path / "model"), reward=Lengths(), max_new_tokens=4)
    actors = Actors.load(spec, trainable=False, reference=False)
    prompts = batch_of([[3, 4]])
    elsewhere = prompts._replace(tokens=prompts.tokens.to("meta"))
    for batch, device in ((prompts, "cpu"), (elsewhere, "meta")):
        found = command._judged(Counting(), RewardCalls(), actors.record, batch, [["a", "bb"]], [[[3], [4, 4]]])
        assert found.device.type == device and found.shape == (1, 2)


@pytest.fixture
def decoded(tmp_path: Path) -> AlignmentDataModule:
    """Return data whose table and value model stand."""
    model = save_tiny_model(tmp_path / "model", alphabet=ALPHABET)
    prompts = ["ab", "cde", "f"]
    (tmp_path / "test.txt").write_text("".join(f"{text}\n" for text in prompts))
    arguments: dict[str, Any] = {
        "policy": model,
        "reward": Lengths(),
        "test": TextSource(path=str(tmp_path / "test.txt")),
        "reference_table": str(tmp_path / "table"),
        "max_new_tokens": 4,
    }
    plain = AlignmentDataModule(**arguments)
    write_table(plain, prompts, samples=8)
    save_value_model(plain, tmp_path / "value", body=model)
    return AlignmentDataModule(**arguments, value_model=str(tmp_path / "value"))


def test_decoders_stand_beside_policies(decoded: AlignmentDataModule, tmp_path: Path) -> None:
    decoders = {"Best-of-2 drawn": BestOfN(2), "Guided n=4": ValueGuided(4, top=3, draws=2)}
    methods = {"Guided n=4": "value model"}
    reports = compare(
        decoded, {}, decoders, methods=methods, output=str(tmp_path / "out"), n=[2], samples=5, device="cpu"
    )
    assert [report.name for report in reports] == ["reference", "Best-of-2", *decoders]
    best, guided = reports[2:]
    assert best.cost is not None
    assert guided.cost is not None
    assert best.kl.mean == pytest.approx(reports[1].kl.mean), "the table's, which knows it"
    assert best.cost["reward_calls"] == 2
    assert guided.length is not None
    assert guided.cost["generated_tokens"] == pytest.approx(guided.length.mean)
    assert best.cost["generated_tokens"] > guided.cost["generated_tokens"]
    assert guided.cost["reward_calls"] == 0 < guided.cost["value_tokens"]
    assert guided.kl.mean > 0
    assert [report.method for report in reports[2:]] == ["Best-of-2", "value model"], "the first word, or as it is said"
    assert [(report.prompts, report.samples) for report in reports[2:]] == [(3, 5), (3, 5)]
    sample, best_of_2 = reports[0].cost, reports[1].cost
    assert sample is not None and best_of_2 is not None and reports[0].length is not None
    assert sample["generated_tokens"] == reports[0].length.mean, "the table's responses"
    assert best_of_2 == {
        "generated_tokens": 2 * sample["generated_tokens"],
        "value_tokens": 0,
        "reward_calls": 2,
        "seconds": best_of_2["seconds"],
    }
    assert best_of_2["seconds"] > 2 * sample["seconds"], "each is scored"
    assert sample["reward_calls"] == 0 < sample["seconds"] < 60

    # By hand: the best of each two of ten responses, and what the decoder itself returns.
    spec = decoded.actors
    actors = Actors.load(
        ActorSpec(spec.policy, reference=spec.policy, reward=Lengths(), max_new_tokens=4, value_model=spec.value_model),
        trainable=False,
        value=True,
    )
    (batch,) = decoded.split_dataloader("test")
    options: dict[str, Any] = {"seed": 0, "stream": "compare", "step": 0}
    drawn = actors.sample(actors.policy, batch, num_samples=10, **options)
    ids = actors.token_ids(drawn)
    rewards = actors.score(batch, actors.decode(ids, batch), ids, drawn.finished)
    assert best.reward.mean == pytest.approx(float(rewards.view(3, 5, 2).amax(-1).mean()), rel=1e-6)
    assert best.cost == {
        "generated_tokens": pytest.approx(float(drawn.mask.sum()) / 15),
        "value_tokens": 0,
        "reward_calls": 2,
        "seconds": best.cost["seconds"],
        "peak_cache_bytes": best.cost["peak_cache_bytes"],
        "peak_cuda_bytes": 0,
        "fallbacks": 0,
    }
    assert 0 < best.cost["seconds"] < 60 and best.cost["peak_cache_bytes"] > 0
    chosen = decoders["Guided n=4"](actors, batch, num_samples=5, **options)
    lengths = chosen.mask.sum(-1).float()
    assert chosen.token_kl is not None
    assert guided.reward.mean == pytest.approx(float(lengths.mean())), "which is what it rewards"
    assert guided.kl.mean == pytest.approx(float(chosen.token_kl.sum() / 15), rel=1e-5)
    assert guided.cost["value_tokens"] == pytest.approx(chosen.cost.value_tokens / 15)
    assert batch.reference_rewards is not None
    won = bon_win_rate(lengths.double(), batch.reference_rewards.double(), n=1)
    assert guided.win_rate is not None
    assert guided.win_rate.mean == pytest.approx(float(won.mean()))

    # In the table of costs, and in the plain numbers.
    head, costs = (tmp_path / "out" / "comparison.md").read_text().split("| a response |")
    assert "| **Guided n=4** |" in head
    assert costs.startswith(" generated tokens | value tokens | reward calls | seconds | peak cache of a batch |")
    rows = {cells[0]: cells[1:] for cells in map(cells_of, costs.splitlines()[2:6])}

    def peak(cost: dict[str, float]) -> str:
        return f"{cost['peak_cache_bytes'] / 2**20:.2f} MiB" if "peak_cache_bytes" in cost else "-"

    assert rows == {
        report.name if report.n else f"**{report.name}**": [
            *(f"{report.cost[field]:,.1f}" for field in ("generated_tokens", "value_tokens", "reward_calls")),
            f"{report.cost['seconds']:.2g}",
            peak(report.cost),
        ]
        for report in reports
        if report.cost is not None
    }
    assert (tmp_path / "out" / "cost.png").stat().st_size > 10_000
    written = json.loads((tmp_path / "out" / "comparison.json").read_text())
    found = [report for report in json_reports(written) if report["name"] in decoders]
    assert [PolicyReport.from_dict(report) for report in found] == [best, guided]


def test_prompts_that_no_table_holds(decoded: AlignmentDataModule, tmp_path: Path) -> None:
    """Win rates are by the distribution that the value model predicts from the prompt, Best-of-N's numbers too."""
    spec = decoded.actors
    streamed = AlignmentDataModule(
        policy=spec.policy,
        reward=Lengths(),
        test=decoded.sources["test"],
        max_new_tokens=4,
        value_model=spec.value_model,
        eval_batch_size=2,  # the last batch has one prompt
    )
    decoders = {"Best-of-2 drawn": BestOfN(2), "Guided n=4": ValueGuided(4, top=3, draws=2)}
    reports = compare(
        streamed,
        {"mine": str(spec.policy)},
        decoders,
        output=str(tmp_path / "out"),
        n=[2, 4],
        samples=5,
        judge=Counting(),
        temperatures=[0.7],
        device="cpu",
    )
    assert [report.name for report in reports] == ["reference", "Best-of-2", "Best-of-4", *decoders, "mine"]
    reference, best, _, drawn, guided, mine = reports
    assert all(report.win_rate_estimator is not None for report in reports)
    assert (reference.n, reference.kl.mean, reference.samples) == (1, 0.0, 5)
    assert reference.judge_reward is not None
    # The policy is the reference: the same samples, hence the same numbers.
    assert (mine.win_rate, mine.win_rate_vs_bon) == (reference.win_rate, reference.win_rate_vs_bon)

    # By hand: F at each sample's reward, and Best-of-N's numbers by the prompts' distributions.
    actors = Actors.load(
        ActorSpec(spec.policy, reference=spec.policy, reward=Lengths(), max_new_tokens=4, value_model=spec.value_model),
        trainable=False,
        value=True,
    )
    scorer = actors.value
    assert scorer is not None
    won, drawn_kl, bon = [], [], []
    for batch in streamed.split_dataloader("test"):
        rollout = actors.rollout(batch, num_samples=5, seed=0, stream="compare", step=0)
        log_cdf = scorer.log_cdf(batch)
        cdf = binned_reward_cdf(rollout.rewards.double(), log_cdf, scorer.bins)
        for place in batch.valid.nonzero().flatten().tolist():
            won.append(((cdf.log_below[place].exp() ** 2 + cdf.log_at_or_below[place].exp() ** 2) / 2).mean())
            row = log_cdf[place : place + 1]
            drawn_kl.append(float(binned_bon_kl(row, scorer.bins, n=2)))
            bon.append(float(binned_bon_reward(row, scorer.bins, n=2)))
    assert len(won) == 3
    assert reference.win_rate_vs_bon[2].mean == pytest.approx(float(torch.stack(won).mean()), rel=1e-6)
    assert best.reward.mean == pytest.approx(sum(bon) / 3)
    assert best.kl.mean == drawn.kl.mean == pytest.approx(sum(drawn_kl) / 3)
    assert guided.win_rate is not None and guided.kl_estimator != drawn.kl_estimator == best.kl_estimator

    text = (tmp_path / "out" / "comparison.md").read_text()
    assert "as the value model predicts them" in text and "| Best-of-4 |" in text
    assert (tmp_path / "out" / "temperatures.json").exists() and (tmp_path / "out" / "pareto.png").exists()


def test_a_table_of_another_vocabulary_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = save_tiny_model(tmp_path / "model", alphabet=ALPHABET)
    data = AlignmentDataModule(
        policy=model, reward=Lengths(), test=[{"text": "ab"}], reference_table=str(tmp_path / "table"), max_new_tokens=4
    )
    write_table(data, ["ab"])

    def largest(table: ReferenceTable, size: int, end_ids: object) -> None:
        raise ReferenceTableError(f"a token beyond {size}")

    monkeypatch.setattr(ReferenceTable, "check_tokens", largest)
    with pytest.raises(ReferenceTableError, match="a token beyond 11"):
        compare(data, {"mine": model}, output=str(tmp_path / "out"), n=[2], device="cpu")


def test_neither_table_nor_value_model(tmp_path: Path) -> None:
    model = save_tiny_model(tmp_path / "model", alphabet=ALPHABET)
    (tmp_path / "test.txt").write_text("ab\n")
    data = AlignmentDataModule(policy=model, reward=Lengths(), test=TextSource(path=str(tmp_path / "test.txt")))
    with pytest.raises(ValueError, match=r"data.reference_table.*data.value_model"):
        compare(data, {"mine": str(model)}, output=str(tmp_path / "out"), device="cpu")


def cells_of(row: str) -> list[str]:
    return [cell.strip() for cell in row.strip("| ").split("|")]


def json_reports(written: Any) -> list[dict[str, Any]]:
    return written["reports"] if isinstance(written, dict) else written


def test_decoders_come_before_policies_and_need_no_value_model_unless_they_say(
    decoded: AlignmentDataModule, tmp_path: Path
) -> None:
    tilted = ModelSpec(str(tmp_path / "model"), tilt=str(tmp_path / "value"))
    policies: dict[str, Any] = {"mine": str(tmp_path / "model"), "tilted": tilted}
    decoded.actors.value_model = None
    drawn = {"drawn": BestOfN(3)}
    reports = compare(decoded, policies, drawn, output=str(tmp_path / "out"), n=[2], samples=2, device="cpu")
    assert [report.name for report in reports] == ["reference", "Best-of-2", "drawn", "mine", "tilted"]
    mine, other = reports[-2:]
    assert mine.cost is not None and mine.length is not None
    assert mine.cost["generated_tokens"] == mine.length.mean, "one sample"
    assert (mine.cost["reward_calls"], mine.cost["value_tokens"]) == (0, 0) and 0 < mine.cost["seconds"] < 60
    # A tower reads along: all but the last token of a response, and its share of the prompt, which two responses have.
    assert other.cost is not None and other.length is not None and other.cost["reward_calls"] == 0
    assert other.cost["value_tokens"] == pytest.approx(other.length.mean - 1 + 2 / 2)


def test_a_decoders_own_model_and_a_kl_that_is_bounded(decoded: AlignmentDataModule, tmp_path: Path) -> None:
    mine = save_tiny_model(tmp_path / "mine", alphabet=ALPHABET, seed=5)
    turned = DeRa(0.5, policy=mine)
    decoders = {"Rejection": SpeculativeRejection(4, every=2), "Turned": turned}
    reports = compare(decoded, {}, decoders, output=str(tmp_path / "out"), n=[2], samples=3, device="cpu")
    rejection, mixed = reports[2:]
    assert (rejection.kl_is_bound, mixed.kl_is_bound) == (True, False)
    assert rejection.kl.mean == pytest.approx(math.log(4)) and 0 < mixed.kl.mean < 5
    assert turned.models[0]._model is None, "the next decoder's models take its place"
    page = (tmp_path / "out" / "comparison.md").read_text()
    row, _ = [line for line in page.splitlines() if "**Rejection**" in line]  # the second is of costs
    assert cells_of(row)[3] == "<= 1.386"
    assert "KL of Rejection: not known, but at most log c" in page and "the place in the picture is not known" in page
    for axes in pareto_figure(reports).axes:
        shown = [text.get_text() for text in axes.texts]
        assert "Turned" in shown and "Rejection" not in shown
    log_row = logs._means(rejection)
    assert log_row["kl"] is None and log_row["reward"] == rejection.reward.mean


@pytest.fixture
def nothing_loads(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let no model be loaded."""

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(Actors, "load", refuse)
    monkeypatch.setattr(command, "load_causal_lm", refuse)


@pytest.mark.usefixtures("nothing_loads")
def test_a_decoder_without_its_value_model(decoded: AlignmentDataModule, tmp_path: Path) -> None:
    decoded.actors.value_model = None
    decoders = {"drawn": BestOfN(2), "Guided": ValueGuided()}
    with pytest.raises(ValueError, match="the decoder 'Guided' needs a value model: set data.value_model"):
        compare(decoded, {}, decoders, output=str(tmp_path / "out"), n=[2])
    assert not (tmp_path / "out").exists()


@pytest.mark.usefixtures("nothing_loads")
@pytest.mark.parametrize("name", ["nowhere", "strange"])
def test_a_decoder_whose_model_does_not_fit(name: str, decoded: AlignmentDataModule, tmp_path: Path) -> None:
    save_tiny_model(tmp_path / "strange", alphabet="xyz")
    tree = TreeBoN(4, preference_policy=str(tmp_path / name))
    with pytest.raises(ModelError, match=f"^the decoder 'tree': the decoder's preference_policy '.*{name}': "):
        compare(decoded, {}, {"drawn": BestOfN(2), "tree": tree}, output=str(tmp_path / "out"), n=[2])
    assert not (tmp_path / "out").exists()


@pytest.mark.usefixtures("nothing_loads")
def test_nothing_to_compare(decoded: AlignmentDataModule, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="name at least one policy to compare"):
        compare(decoded, output=str(tmp_path / "out"))


@pytest.mark.parametrize("cards", [True, False])
def test_the_cards_of_exports_get_the_results(decoded: AlignmentDataModule, tmp_path: Path, cards: bool) -> None:
    export = save_tiny_model(tmp_path / "policy", alphabet=ALPHABET, seed=4)
    before = "---\ntags:\n- vbon-lightning\n---\n\n# Mine\n"
    (tmp_path / "policy" / "README.md").write_text(before)
    policies = {"mine": export, "too": {"name": export, "dtype": "float32"}, "the start": str(tmp_path / "model")}
    compare(decoded, policies, output=str(tmp_path / "out"), n=[2], samples=5, device="cpu", cards=cards)
    text = (tmp_path / "policy" / "README.md").read_text()
    assert not (tmp_path / "model" / "README.md").exists()
    if not cards:
        assert text == before
        return
    assert "| **mine** |" in text and "| **too** |" in text and "the start" not in text
    lines = ("prompts: 3, the test split of test.txt", "responses a prompt: 5", "longest response: 4 tokens", "seed: 0")
    assert all(f"- {line}\n" in text for line in lines)
    assert str(tmp_path) not in text


def test_where_a_comparison_is_logged(decoded: AlignmentDataModule, tmp_path: Path) -> None:
    mine = TensorBoardLogger(tmp_path / "mine", name="", version="")
    for name, logger in (("default", True), ("none", False), ("given", [mine])):
        out = tmp_path / name
        compare(decoded, {}, {"decoder": BestOfN(2)}, output=str(out), n=[2], samples=2, device="cpu", logger=logger)
        assert (out / "comparison.json").is_file()
        assert bool(list(out.rglob("events.out.tfevents.*"))) == (name == "default")
    assert list((tmp_path / "mine" / "Best-of-N").glob("events.out.tfevents.*"))


@pytest.mark.parametrize(
    ("arguments", "kind"),
    [
        ([], bool),
        (["--logger", "false"], bool),
        (["--logger", "lightning.pytorch.loggers.CSVLogger", "--logger.save_dir", "x"], CSVLogger),
        (["--logger", '[{"class_path": "lightning.pytorch.loggers.CSVLogger", "init_args": {"save_dir": "x"}}]'], list),
    ],
    ids=str,
)
def test_a_logger_on_the_command_line(arguments: list[str], kind: type) -> None:
    parser = command.build_parser()
    found = parser.instantiate_classes(parser.parse_args(["--data.policy", "x", *arguments])).logger
    assert isinstance(found, kind)
    assert found is not False or "false" in arguments


class PickyLengths(Lengths):
    """Says nothing of responses that begin with one of some letters; as many calls at once as were seen."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: set[int] = set()

    def __call__(self, prompts: Any, responses: Any, token_ids: Any) -> Tensor:
        self.sizes.add(len(prompts))
        silent = torch.tensor([[text.startswith(("a", "b", "c")) for text in row] for row in responses])
        return super().__call__(prompts, responses, token_ids).masked_fill(silent, torch.nan)


@pytest.mark.filterwarnings("ignore:the reward says None")
def test_responses_without_a_reward_are_counted(tmp_path: Path) -> None:
    model = save_tiny_model(tmp_path / "model", alphabet=ALPHABET)
    prompts = ["ab", "cde", "f"]
    (tmp_path / "test.txt").write_text("".join(f"{text}\n" for text in prompts))
    reward, judge = PickyLengths(), PickyLengths()
    data = AlignmentDataModule(
        policy=model,
        reward=reward,
        reward_calls=RewardCalls(on_missing="skip", workers=2),
        test=TextSource(path=str(tmp_path / "test.txt")),
        reference_table=str(tmp_path / "table"),
        max_new_tokens=4,
    )
    write_table(data, prompts, samples=6)
    settings: dict[str, Any] = {"n": [2], "samples": 24, "device": "cpu", "judge": judge, "temperatures": [1.5]}
    drawn, mine = compare(
        data, {"mine": model}, {"Best-of-2 drawn": BestOfN(2)}, output=str(tmp_path / "out"), **settings
    )[-2:]
    assert 0 < mine.missing < 72
    assert drawn.judge_reward is not None and drawn.judge_reward.mean == pytest.approx(drawn.reward.mean)
    assert mine.judge_reward is not None
    assert mine.judge_reward.mean == pytest.approx(mine.reward.mean), "of the same responses"
    assert reward.sizes == judge.sizes == {1}, "each prompt by itself"
    plain = json.loads((tmp_path / "out" / "comparison.json").read_text())
    assert plain["reports"][-1]["missing"] == mine.missing

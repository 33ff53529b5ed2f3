"""What holds for every decoder: whatever the batch, the policy and the reward."""

from __future__ import annotations

import ast
import copy
import dataclasses
import inspect
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import MambaConfig, MambaForCausalLM, MistralConfig, MistralForCausalLM

from tests.decoding.setting import OPTIONS, PROMPT, Told, load, save_models, score
from tests.helpers import save_tiny_classifier, tiny_tokenizer
from tests.models.setting import new_model, scramble
from tests.sampling.test_decode import batch_of
from vbon_lightning import decoding
from vbon_lightning.actors import Actors
from vbon_lightning.decoding import (
    BestOfN,
    Decoded,
    Decoder,
    DeRa,
    InferenceTimePessimism,
    SequentialMonteCarlo,
    SoftBestOfN,
    SpeculativeRejection,
    TreeBoN,
    ValueGuided,
)
from vbon_lightning.decoding.growing import Grove
from vbon_lightning.functional import reinforce_loss, sequence_log_prob
from vbon_lightning.models import ModelError, ModelSpec, TiltedLM, load_causal_lm, new_tilted_lm
from vbon_lightning.prefix_scorer import PrefixScorer
from vbon_lightning.rewards import ClassifierReward, RewardCalls, RewardModel
from vbon_lightning.sampling import cache as cache_module
from vbon_lightning.sampling import decode as decode_module
from vbon_lightning.sampling.passes import InPasses
from vbon_lightning.types import Completions, PromptBatch

PROMPTS = [PROMPT, [3], [4, 3], [3, 3, 4, 4, 3]]
LENGTH = 5

DECODERS: dict[str, Callable[[Path], Decoder]] = {
    "best_of_n": lambda _: BestOfN(3),
    "soft": lambda _: SoftBestOfN(3),
    "speculative": lambda _: SpeculativeRejection(4, every=2),
    "tree": lambda _: TreeBoN(4, layers=2),
    "tree by a policy": lambda files: TreeBoN(4, layers=2, preference_policy=str(files / "other")),
    "pessimism": lambda _: InferenceTimePessimism(3, at_once=2),
    "dera": lambda files: DeRa(0.5, policy=str(files / "other")),
    "particles": lambda _: SequentialMonteCarlo(4, every=2, threshold=1.0),
    "valued particles": lambda _: SequentialMonteCarlo(4, twist="value", every=2, threshold=1.0),
    "guided": lambda _: ValueGuided(4, top=3, draws=1),
}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_models(tmp_path_factory.mktemp("models"))


def load_valued(files: Path, **changes: Any) -> Actors:
    """Load the policy, and a value model beside it."""
    found = load(files, LENGTH, temperature=0.9, **changes)
    found.value = PrefixScorer(scramble(new_model(str(files / "other"), longest=LENGTH)))
    return found


@pytest.fixture(scope="module")
def actors(files: Path) -> Actors:
    return load_valued(files)


@pytest.fixture(params=DECODERS)
def decoder(request: pytest.FixtureRequest, files: Path) -> Decoder:
    return DECODERS[request.param](files)


def prompts_of(rows: list[list[int]]) -> PromptBatch:
    """Make a batch whose prompts keep their numbers, whichever of them are in it."""
    return batch_of(rows)._replace(index=torch.tensor([PROMPTS.index(row) for row in rows]))


def decode(decoder: Decoder, actors: Actors, prompts: PromptBatch | None = None, samples: int = 3) -> Decoded:
    return decoder(actors, prompts_of(PROMPTS) if prompts is None else prompts, num_samples=samples, **OPTIONS)


def test_all_of_them_are_here(files: Path) -> None:
    public = {getattr(decoding, name) for name in decoding.__all__}
    decoders = {one for one in public if inspect.isclass(one) and issubclass(one, Decoder)} - {Decoder}
    assert {type(make(files)) for make in DECODERS.values()} == decoders


def test_the_batch_does_not_matter_and_the_seed_does(decoder: Decoder, actors: Actors) -> None:
    whole = decode(decoder, actors)
    ids = actors.token_ids(whole)
    for rows in ([1], [3, 0], [2]):
        found = decode(decoder, actors, prompts_of([PROMPTS[row] for row in rows]))
        assert actors.token_ids(found) == [ids[row] for row in rows]
        assert torch.equal(found.finished, whole.finished[rows])
    for change in ({"seed": 4}, {"stream": "other"}, {"step": 3}):
        other = decoder(actors, prompts_of(PROMPTS), num_samples=3, **(OPTIONS | change))
        assert actors.token_ids(other) != ids


def test_the_rows_that_live_at_once_do_not_matter(decoder: Decoder, actors: Actors) -> None:
    """They are what ``data.max_rows`` says: some prompts at a time, and of each some responses where it has more."""
    whole = decode(decoder, actors)
    for limit in (24, decoder.rows + 1):  # a prompt takes three times the decoder's rows
        rows: list[int] = []
        bounded = dataclasses.replace(actors, sampler=InPasses(actors.sampler, limit))
        hook = actors.policy.get_input_embeddings().register_forward_hook(lambda _, ids, out: rows.append(len(out)))  # noqa: B023
        try:
            found = decode(decoder, bounded)
        finally:
            hook.remove()
        assert actors.token_ids(found) == actors.token_ids(whole)
        assert max(rows) <= limit
        assert found.cost.generated_tokens == whole.cost.generated_tokens
        assert found.cost.reward_calls == whole.cost.reward_calls
        # A prompt whose responses are made in several goes is read in each.
        assert found.cost.value_tokens == whole.cost.value_tokens or limit < 24
        assert torch.equal(found.finished, whole.finished) and found.kl_bound == whole.kl_bound
        assert (found.rewards is None) == (whole.rewards is None)
        assert found.rewards is None or torch.equal(found.rewards, whole.rewards)  # type: ignore[arg-type]
    if decoder.rows > 1:
        few = dataclasses.replace(actors, sampler=InPasses(actors.sampler, decoder.rows - 1))
        with pytest.raises(ValueError, match=rf"^data\.max_rows is 3, and {type(decoder).__name__}"):
            decode(decoder, few)


def test_what_is_chosen_is_no_sample_of_a_policy(decoder: Decoder, actors: Actors) -> None:
    found: Any = decode(decoder, actors)
    assert isinstance(found, Decoded) and not isinstance(found, Completions)
    assert not {"log_probs"} & set(Decoded._fields)
    with pytest.raises(AttributeError, match="log_probs"):
        sequence_log_prob(found.log_probs, found.mask)
    with pytest.raises(AttributeError, match="log_probs"):
        reinforce_loss(log_probs=found.log_probs, advantages=torch.zeros(4, 3), mask=found.mask)


def test_responses_end_where_they_say(decoder: Decoder, actors: Actors) -> None:
    found = decode(decoder, actors, samples=40)
    ends = torch.isin(found.tokens, torch.tensor(actors.end_ids)) & found.mask
    lengths = found.mask.sum(-1)
    assert torch.equal(ends.any(-1), found.finished) and bool((ends.sum(-1) <= 1).all())
    last = found.tokens.gather(-1, lengths[..., None] - 1).squeeze(-1)
    assert torch.equal(torch.isin(last, torch.tensor(actors.end_ids)), found.finished)
    assert bool((lengths[~found.finished] == LENGTH).all())
    assert 0 < int(found.finished.sum()) < found.finished.numel()


def test_the_rewards_are_those_of_the_responses(decoder: Decoder, actors: Actors) -> None:
    fined = dataclasses.replace(actors, missing_eos_penalty=2.0)
    found, prompts = decode(decoder, fined), prompts_of(PROMPTS)
    ids = actors.token_ids(found)
    if not decoder.needs_reward:
        assert found.rewards is None, "which whoever asks for them then scores"
        return
    assert found.rewards is not None
    expected = fined.score(prompts, actors.decode(ids, prompts), ids, found.finished)
    assert torch.equal(found.rewards, expected)


@pytest.mark.filterwarnings("ignore:the reward says None")
def test_responses_without_a_reward(decoder: Decoder, actors: Actors) -> None:
    """None is chosen unless there is nothing else to choose from."""
    skip = RewardCalls(on_missing="skip")
    some = dataclasses.replace(actors, reward=Told(silent=[4]), reward_calls=skip)
    none = dataclasses.replace(actors, reward=Told(silent=range(5)), reward_calls=skip)
    found, silent = decode(decoder, some, samples=30), decode(decoder, none)
    assert silent.mask.any(-1).all()
    if not decoder.needs_reward:
        return
    assert found.rewards is not None and silent.rewards is not None
    assert bool(silent.rewards.isnan().all())
    assert torch.equal(found.rewards.isnan(), found.tokens[..., 0] == 4)
    plain = actors.sample(actors.policy, prompts_of(PROMPTS), num_samples=30, **OPTIONS)
    assert int(found.rewards.isnan().sum()) < 0.7 * int((plain.tokens[..., 0] == 4).sum())


class LongOnesUnknown(Told):
    """Says nothing of responses that the limit cut, nor, of others, of some."""

    def __call__(self, prompts: Any, responses: Any, token_ids: Any) -> Tensor:
        rewards = super().__call__(prompts, responses, token_ids)
        return torch.tensor(
            [
                [
                    math.nan if len(ids) == LENGTH and sum(ids) % 3 else reward
                    for ids, reward in zip(rows, told, strict=True)
                ]
                for rows, told in zip(token_ids, rewards.tolist(), strict=True)
            ]
        )


@pytest.mark.filterwarnings("ignore:the reward says None")
def test_one_without_a_reward_is_chosen_only_where_no_whole_one_that_is_left_has_one(
    decoder: Decoder, actors: Actors, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rewards that are there for beginnings and then are not: those that were dropped on the way are gone."""
    if not decoder.needs_reward:
        return
    reward, left = LongOnesUnknown(), list[Tensor]()
    rewards_of = Grove.rewards
    monkeypatch.setattr(Grove, "rewards", lambda grove: left.append(rewards_of(grove)) or left[-1])
    unsure = dataclasses.replace(actors, reward=reward, reward_calls=RewardCalls(on_missing="skip"))
    unknown = 0
    for step in range(25):
        left.clear(), reward.asked.clear()
        found = decoder(unsure, prompts_of([PROMPT]), num_samples=1, **(OPTIONS | {"step": step}))
        assert found.rewards is not None
        last = left[-1].flatten() if left else reward([""], [[]], [reward.asked[:]]).flatten()
        assert bool(found.rewards.isnan()) == bool(last.isnan().all())
        unknown += int(last.isnan().any())
    assert unknown


class Beside(RewardModel):
    """Reads a column and the prompt's text: every row must come with its own."""

    columns = ("letter",)

    def __call__(self, prompts: Any, responses: Any, token_ids: Any, *, columns: Any) -> Tensor:
        letter = columns["letter"]
        assert [int(text) for text in prompts] == [int(one) for one in letter]
        return torch.tensor(
            [
                [float(ids.count(3)) * int(one) + len(ids) for ids in rows]
                for rows, one in zip(token_ids, letter, strict=True)
            ]
        )

    def identity(self) -> dict[str, str]:
        return {"class": "Beside"}


def test_each_response_is_scored_with_what_stands_beside_its_prompt(decoder: Decoder, actors: Actors) -> None:
    told = [str(place) for place in range(len(PROMPTS))]
    prompts = prompts_of(PROMPTS)._replace(text=told, columns={"letter": told})
    found = decode(decoder, dataclasses.replace(actors, reward=Beside()), prompts)
    if decoder.needs_reward:
        assert found.rewards is not None
        counts = ((found.tokens == 3) & found.mask).sum(-1) * torch.arange(4)[:, None]
        assert torch.equal(found.rewards, (counts + found.mask.sum(-1)).float())


def test_what_is_missing_is_said_before_anything_is_run(decoder: Decoder, actors: Actors) -> None:
    if decoder.needs_reward:
        with pytest.raises(ValueError, match=r"^this needs a reward: set `data\.reward`$"):
            decode(decoder, dataclasses.replace(actors, reward=None))
    if decoder.needs_value_model:
        with pytest.raises(ValueError, match=r"needs a value model: name one as data\.value_model$"):
            decode(decoder, dataclasses.replace(actors, value=None))


def test_what_it_takes_is_measured(decoder: Decoder, actors: Actors) -> None:
    cost = decode(decoder, actors).cost
    assert 0 < cost.seconds < 60 and cost.peak_cuda_bytes == 0
    # A token of the policy takes 2 x 8 floats of keys and values.
    assert cost.peak_cache_bytes >= 12 * 64
    assert decode(decoder, actors, samples=12).cost.peak_cache_bytes > cost.peak_cache_bytes


def test_it_is_described_by_what_it_depends_on(files: Path) -> None:
    described = [make(files).identity() for make in DECODERS.values()]
    assert all(described.count(one) == 1 for one in described)
    assert TreeBoN(8).identity() == {"class": "TreeBoN", "n": 8, "layers": 4, "branches": 2, "preference_policy": None}
    assert copy.deepcopy(TreeBoN(branches=4)).identity() == TreeBoN(8, 4, 4).identity()
    by = [DeRa(0.5, policy=str(files / name)).identity()["policy"] for name in ("other", "policy")]
    assert by[0] != by[1] and str(files) not in str(by)


class Hiding(BestOfN):
    """Keeps its option where nobody looks for it."""

    def __init__(self, n: int = 2, *, rank: Any = 1) -> None:
        super().__init__(n)
        self._hidden = rank


def test_ones_own_is_described_by_what_it_is_given_and_by_where_it_is_from() -> None:
    assert Hiding(rank=3).identity() == {"class": f"{__name__}.Hiding", "n": 2, "rank": 3}
    assert Hiding(rank=[1, {"a": None}]).identity()["rank"] == [1, {"a": None}]
    for rank in (print, [print], {"a": {"b": print}}):
        with pytest.raises(
            ValueError, match=r"^Hiding cannot describe its option rank, which is no plain value, and .*"
        ):
            Hiding(rank=rank).identity()


def test_one_that_says_nothing_of_its_rows_is_bounded_all_the_same(files: Path, actors: Actors) -> None:
    decoder = SpeculativeRejection(4, every=2)
    decoder.rows = 1  # as if it had forgotten
    few = dataclasses.replace(actors, sampler=InPasses(actors.sampler, 12))
    with pytest.raises(ValueError, match=r"^data\.max_rows is 12, and 48 rows were asked for at once: .*`rows = n`"):
        decode(decoder, few)


NEEDS_ONE = ["best_of_n", "soft", "speculative", "tree", "pessimism", "particles"]


@pytest.mark.parametrize("name", NEEDS_ONE)
def test_a_classifier_as_the_reward(name: str, files: Path, actors: Actors, tmp_path: Path) -> None:
    reward = ClassifierReward(save_tiny_classifier(tmp_path / "reward"), label="POSITIVE")
    found = decode(DECODERS[name](files), dataclasses.replace(actors, reward=reward))
    assert found.rewards is not None and bool(found.rewards.isfinite().all())


@pytest.mark.parametrize("kind", ["windows", "recurrent", "tilted", "shared prompts"])
@pytest.mark.parametrize("name", ["speculative", "tree", "particles", "dera"])
def test_any_policy(
    kind: str, name: str, files: Path, actors: Actors, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """With windows, without a cache, with prompts that are held once: as of a plain pass for every token."""
    small: dict[str, Any] = {"vocab_size": 5, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}
    small |= {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "initializer_range": 0.5}
    policy: Any = actors.policy
    if kind == "windows":
        heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 64}
        policy = MistralForCausalLM(MistralConfig(**small, **heads, sliding_window=4)).eval()
    elif kind == "tilted":
        tower: Any = load_causal_lm(str(files / "other"), trainable=False)
        policy = new_tilted_lm(load_causal_lm(str(files / "policy"), trainable=False), tower.base_model).eval()
        torch.nn.init.normal_(policy.heads[0].weight, generator=torch.Generator().manual_seed(0))
    elif kind == "recurrent":
        policy = MambaForCausalLM(MambaConfig(**small, state_size=4)).eval()
    else:
        monkeypatch.setattr(decode_module, "SHARE_FROM", 1)
    found = decode(DECODERS[name](files), dataclasses.replace(actors, policy=policy, reference=policy))
    if kind == "shared prompts":
        assert cache_module.can_share_prompts(policy)
    policy = without_cache(policy, monkeypatch)
    expected = decode(DECODERS[name](files), dataclasses.replace(actors, policy=policy, reference=policy))
    assert actors.token_ids(found) == actors.token_ids(expected)
    assert found.cost[:3] == expected.cost[:3]


def towers_read(models: list[Any], run: Callable[[], Decoded]) -> tuple[Decoded, int]:
    """Count the tokens that the towers among some models are given while something runs, padding left out."""
    read = 0

    def note(_: Any, given: tuple[Any, ...], named: dict[str, Any]) -> None:
        nonlocal read
        ids, mask = named["input_ids"], named.get("attention_mask")
        read += ids.numel() if mask is None else int(mask[..., -ids.shape[-1] :].sum())

    towers = [model.tower for model in models if isinstance(model, TiltedLM)]
    hooks = [tower.register_forward_pre_hook(note, with_kwargs=True) for tower in towers]
    try:
        return run(), read
    finally:
        for hook in hooks:
            hook.remove()


@pytest.mark.parametrize("name", [*DECODERS, "dera with two towers", "tree by a tilted policy"])
def test_what_towers_read_is_counted(name: str, files: Path, actors: Actors) -> None:
    """That of the policy and that of a decoder's own model, beside what it counts of other models."""
    where = str(files / "other")
    own = {
        "dera with two towers": lambda: DeRa(0.5, policy=ModelSpec(where, tilt=where)),
        "tree by a tilted policy": lambda: TreeBoN(4, layers=2, preference_policy=ModelSpec(where, tilt=where)),
    }
    decoder = own[name]() if name in own else DECODERS[name](files)
    # No response ends, so that all rows are run to the last.
    endless = dataclasses.replace(actors, end_ids=(99,))
    policy: Any = load_causal_lm(ModelSpec(str(files / "policy"), tilt=where), trainable=False)
    models = [policy, *(model.load(endless) for model in decoder.models)]
    tilted = dataclasses.replace(endless, policy=policy, reference=policy)
    decode(decoder, tilted)  # the first time it is tried out how such models can be run
    found, read = towers_read(models, lambda: decode(decoder, tilted))
    plain = "dera" if name.startswith("dera") else "tree by a policy" if name in own else name
    beside = decode(DECODERS[plain](files), endless).cost
    assert found.cost.generated_tokens == beside.generated_tokens
    assert read > 0 and found.cost.value_tokens == beside.value_tokens + read


def without_cache(policy: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(decode_module, "runs_plain", lambda model: model is policy)
    return policy


def test_further_models_are_checked_loaded_once_and_forgotten(files: Path, actors: Actors) -> None:
    decoder = DeRa(0.5, policy=str(files / "other"))
    (model,) = decoder.models
    decoder.check(actors.tokenizer)
    loaded = model.load(actors)
    decode(decoder, actors)
    assert model.load(actors) is loaded
    assert not loaded.training and not any(parameter.requires_grad for parameter in loaded.parameters())
    decoder.release()
    assert model.load(actors) is not loaded
    with pytest.raises(ModelError, match=r"^the decoder's policy '.*nowhere': "):
        DeRa(0.5, policy=str(files / "nowhere")).check(actors.tokenizer)
    with pytest.raises(ModelError, match="it and the model that is decoded from need one vocabulary"):
        DeRa(0.5, policy=str(files / "strange")).check(tiny_tokenizer(alphabet="ab"))


def test_a_decoder_is_one_file() -> None:
    package = Path(decoding.__file__).parent
    for path in package.glob("*.py"):
        classes = [node for node in ast.parse(path.read_text()).body if isinstance(node, ast.ClassDef)]
        derived = [one for one in classes if any(getattr(base, "id", "") == "Decoder" for base in one.bases)]
        assert len(derived) <= 1 and (not derived or len(path.read_text().splitlines()) < 200), path


@pytest.mark.filterwarnings("ignore:the reward says None")
def test_the_decoder_of_ones_own_that_is_printed(actors: Actors) -> None:
    page = (Path(__file__).parents[2] / "docs" / "decoding.md").read_text()
    (source,) = (part.split("```")[0] for part in page.split("```python\n") if "(Decoder)" in part)
    names: dict[str, Any] = {}
    exec(source, names)
    found = decode(names["SecondBest"](3), actors)
    drawn = actors.sample(actors.policy, prompts_of(PROMPTS), num_samples=9, **OPTIONS)
    for prompt, (rewards, ids) in enumerate(zip(found.rewards.tolist(), actors.token_ids(drawn), strict=True)):  # type: ignore[union-attr]
        groups = [sorted(score(one) for one in ids[start : start + 3]) for start in (0, 3, 6)]
        assert rewards == pytest.approx([group[1] for group in groups]), prompt
    silent = dataclasses.replace(actors, reward=Told(silent=[3, 4]), reward_calls=RewardCalls(on_missing="skip"))
    partly = decode(names["SecondBest"](6), silent)
    assert not bool(partly.rewards.isnan().all()), "one without a reward is not the best"  # type: ignore[union-attr]
    with pytest.raises(ValueError, match="^n must be at least 2, got 1$"):
        names["SecondBest"](1)

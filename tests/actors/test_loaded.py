"""Loading, rolling out and scoring."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from tokenizers import decoders, pre_tokenizers
from torch import Tensor, nn

from tests.helpers import EOS, save_tiny_model, tiny_tokenizer
from vbon_lightning.actors import Actors, ActorSpec
from vbon_lightning.functional import kl_k1, sequence_log_prob
from vbon_lightning.models import ModelError, ModelSpec
from vbon_lightning.rewards import RewardCalls, RewardError, RewardFailure, RewardModel, WeightedReward
from vbon_lightning.sampling import sample_completions
from vbon_lightning.types import Completions, PromptBatch

ALPHABET = "abcdefgh"
DROPOUT = {"attn_pdrop": 0.5, "resid_pdrop": 0.5, "embd_pdrop": 0.5}


class Lengths(RewardModel):
    """Rewards a response by its number of tokens, and keeps what it was called with."""

    def __init__(self, name: str = "lengths") -> None:
        self.name, self.calls, self.device = name, [], None

    def __call__(self, prompts: Any, responses: Any, token_ids: Any) -> Tensor:
        self.calls.append((list(prompts), responses, token_ids))
        return torch.tensor([[float(len(ids)) for ids in group] for group in token_ids])

    def identity(self) -> dict[str, str]:
        return {"name": self.name}

    def to(self, device: Any) -> Lengths:
        self.device = device
        return self


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    return {
        "policy": save_tiny_model(root / "policy", alphabet=ALPHABET, seed=1, spread=2.0),
        "reference": save_tiny_model(root / "reference", alphabet=ALPHABET, seed=2, spread=2.0),
        "dropout": save_tiny_model(root / "dropout", "gpt2", alphabet=ALPHABET, **DROPOUT),
        "other": save_tiny_model(root / "other", alphabet="hgfedcba"),
        "wide": save_tiny_model(root / "wide", alphabet=ALPHABET, generation={"eos_token_id": [EOS, 5]}),
    }


def load(models: dict[str, str], *, seed: int = 0, trainable: bool = True, **settings: Any) -> Actors:
    entries: dict = {
        "policy": models["policy"],
        "reference": models["reference"],
        "reward": Lengths(),
        "max_new_tokens": 8,
    }
    return Actors.load(ActorSpec(**(entries | settings)), seed=seed, trainable=trainable)


def prompts(index: tuple[int, ...] = (0, 1, 2), *, width: int = 4) -> PromptBatch:
    rows = [[[3, 4, 5], [6], [7, 8, 3, 4]][i] for i in index]
    return PromptBatch(
        torch.tensor(index),
        torch.ones(len(rows), dtype=torch.bool),
        torch.tensor([[0] * (width - len(row)) + row for row in rows]),
        torch.tensor([[False] * (width - len(row)) + [True] * len(row) for row in rows]),
        [["abc", "d", "efab"][i] for i in index],
    )


def roll(actors: Actors, batch: PromptBatch | None = None, **settings: Any) -> Any:
    entries: dict = {"num_samples": 6, "seed": 3, "stream": "train", "step": 0}
    return actors.rollout(prompts() if batch is None else batch, **(entries | settings))


def score_some(actors: Actors, **settings: Any) -> Any:
    entries: dict = {"num_samples": 6, "seed": 3, "stream": "train", "step": 0}
    return actors.scored_responses(prompts(), **(entries | settings))


# --- spec ---


def test_dropout_is_off_and_the_reference_frozen(models):
    actors = Actors.load(ActorSpec(models["dropout"], reward=Lengths()))
    assert actors.reference is not None
    assert actors.policy.training
    assert not actors.reference.training
    for model in (actors.policy, actors.reference):
        assert [module.p for module in model.modules() if isinstance(module, nn.Dropout)].count(0.0) > 2
        assert not any(module.p for module in model.modules() if isinstance(module, nn.Dropout))
    assert all(parameter.requires_grad for parameter in actors.policy.parameters())
    assert not any(parameter.requires_grad for parameter in actors.reference.parameters())
    tokens = torch.tensor([[3, 4, 5, 6]])
    assert torch.equal(actors.policy(input_ids=tokens).logits, actors.policy(input_ids=tokens).logits)
    assert torch.allclose(actors.policy(input_ids=tokens).logits, actors.reference(input_ids=tokens).logits)


def test_dropout_is_kept_for_fine_tuning(models):
    policy = Actors.load(ActorSpec(models["dropout"]), reference=False, keep_dropout=True).policy
    tokens = torch.tensor([[3, 4, 5, 6]])
    assert not torch.equal(policy(input_ids=tokens).logits, policy(input_ids=tokens).logits)


def test_policy_and_reference_do_not_share_weights(models):
    actors = Actors.load(ActorSpec(models["policy"]))
    assert actors.reference is not None
    ours = {parameter.data_ptr() for parameter in actors.policy.parameters()}
    assert not ours & {parameter.data_ptr() for parameter in actors.reference.parameters()}


def test_a_policy_from_a_config_starts_at_its_reference(models):
    config = {"model_type": "gpt2", "n_embd": 8, "n_layer": 1, "n_head": 1, "n_positions": 16}
    new = ActorSpec(ModelSpec(config=config, tokenizer=models["policy"]))
    one, other = Actors.load(new, seed=1), Actors.load(new, seed=2)
    assert one.reference is not None
    weights = [model.get_output_embeddings().weight for model in (one.policy, one.reference, other.policy)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def test_vocabularies_must_agree(models, tmp_path):
    with pytest.raises(ModelError, match="policy and reference need one vocabulary, but 8 tokens differ"):
        load(models, reference=models["other"])
    padded = ModelSpec(
        config={"model_type": "gpt2", "n_embd": 8, "n_layer": 1, "n_head": 1, "vocab_size": 16},
        tokenizer=models["policy"],
    )
    with pytest.raises(ModelError, match="one vocabulary, but their outputs have 11 and 16 entries"):
        load(models, reference=padded)


def test_ends_of_responses_must_agree(models):
    with pytest.raises(ModelError, match=r"end their responses differently, with the tokens \[2\] and \[2, 5\]"):
        load(models, reference=models["wide"])
    assert load(models, policy=models["wide"], reference=models["wide"]).end_ids == (2, 5)


def test_place_moves_the_reference_and_the_reward(models):
    actors = load(models)
    assert actors.reference is not None
    actors.policy.to(torch.bfloat16)
    actors.place()
    assert actors.reference.dtype == torch.bfloat16
    assert actors.reward.device == torch.device("cpu")
    actors.policy.to(torch.float64)
    actors.place()
    assert actors.reference.dtype == torch.float64


def test_place_takes_a_reward_that_cannot_be_moved(models):
    class Bare:
        def __call__(self, prompts: Any, responses: Any, token_ids: Any) -> list[list[float]]:
            return [[0.0] * len(group) for group in responses]

        def identity(self) -> dict[str, str]:
            return {}

    assert roll(load(models, reward=Bare())).rewards.shape == (3, 6)


# --- rollouts ---


def test_token_ids_are_kept_from_sampling_to_reward(models):
    actors = load(models)
    rollout = roll(actors)
    ((texts, responses, token_ids),) = actors.reward.calls
    assert texts == rollout.prompts.text
    assert responses == rollout.responses
    for prompt in range(3):
        for sample in range(6):
            ids = token_ids[prompt][sample]
            mask = rollout.completions.mask[prompt, sample]
            assert ids == rollout.completions.tokens[prompt, sample][mask].tolist()
            assert (ids[-1] == EOS) == bool(rollout.completions.finished[prompt, sample])
            assert EOS not in ids[:-1]
            assert len(ids) == 8 or ids[-1] == EOS
            letters = "".join(ALPHABET[i - 3] for i in ids if i > 2)
            assert responses[prompt][sample] == letters
    assert rollout.completions.finished.any()
    assert not rollout.completions.finished.all()


def test_responses_are_decoded_behind_their_prompt():
    # This tokenizer, like SentencePiece ones, drops the space a text begins with.
    tokenizer = tiny_tokenizer(alphabet="\u2581ab")
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.backend_tokenizer.decoder = decoders.Sequence([decoders.Metaspace()])
    actors = Actors(nn.Identity(), None, None, tokenizer, (EOS,), 4, 1.0)  # type: ignore[arg-type]
    space, a, b = 3, 4, 5
    assert actors.decode([[[space, a], [b]]]) == [["a", "b"]]
    batch = PromptBatch(
        torch.arange(2), torch.ones(2, dtype=torch.bool), torch.tensor([[0, a], [space, b]]), torch.ones(2, 2), ["", ""]
    )
    assert actors.decode([[[space, a], [b, EOS]], [[a], [space, a]]], batch) == [[" a", "b"], ["a", " a"]]


def test_half_a_character_at_the_seam_changes_no_neighbour():
    tokenizer = tiny_tokenizer()
    first, second = tokenizer("é")["input_ids"]
    (letter,) = tokenizer("a")["input_ids"]
    actors = Actors(nn.Identity(), None, None, tokenizer, (EOS,), 4, 1.0)  # type: ignore[arg-type]
    batch = PromptBatch(
        torch.arange(1), torch.ones(1, dtype=torch.bool), torch.tensor([[first]]), torch.ones(1, 1), [""]
    )
    assert actors.decode([[[second, letter], [letter]]], batch) == [["\ufffda", "a"]]
    assert actors.decode([[[letter]]], batch) == [["a"]]


def test_the_penalty_is_for_cut_responses_only(models):
    plain, punished = roll(load(models)), roll(load(models, missing_eos_penalty=2.5))
    finished = plain.completions.finished
    assert torch.equal(punished.completions.tokens, plain.completions.tokens)
    assert torch.equal(punished.rewards[finished], plain.rewards[finished])
    assert torch.equal(punished.rewards[~finished], plain.rewards[~finished] - 2.5)
    assert finished.any()
    assert not finished.all()
    assert torch.equal(plain.rewards, plain.completions.mask.sum(-1).float())


def test_a_reward_is_needed(models):
    with pytest.raises(ValueError, match=r"this needs a reward: set `data.reward`"):
        roll(load(models, reward=None))


def test_a_rollout_depends_on_its_prompts_only(models):
    actors = load(models)
    together, alone = roll(actors), roll(actors, prompts((1,), width=2))
    length = alone.completions.tokens.shape[-1]
    assert torch.equal(alone.completions.mask[0], together.completions.mask[1, :, :length])
    assert torch.equal(alone.completions.tokens[0], together.completions.tokens[1, :, :length])
    assert torch.allclose(alone.log_probs[0], together.log_probs[1, :, :length], atol=1e-5)
    assert torch.allclose(alone.token_kl[0], together.token_kl[1, :, :length], atol=1e-5)
    assert alone.responses[0] == together.responses[1]
    for change in ({"step": 1}, {"stream": "val"}, {"seed": 4}):
        assert roll(actors, **change).responses != together.responses


def test_reference_rewards_online(models):
    actors = load(models, missing_eos_penalty=2.5)
    rollout = roll(actors, reference_samples=7)
    sampled = actors.sample(actors.reference, prompts(), num_samples=7, seed=3, stream="train/reference", step=0)
    expected = sampled.mask.sum(-1).float() - 2.5 * (~sampled.finished).float()
    assert torch.equal(rollout.reference_rewards, expected)
    assert roll(actors).reference_rewards is None
    table = torch.zeros(3, 4)
    brought = roll(actors, prompts()._replace(reference_rewards=table), reference_samples=7)
    assert brought.reference_rewards is table


def test_the_reference_draws_other_noise_than_the_policy(models):
    actors = load(models, reference=models["policy"])
    rollout = roll(actors, reference_samples=6, num_samples=6)
    assert not torch.equal(rollout.reference_rewards, rollout.rewards)


def test_without_a_reference(models):
    actors = Actors.load(ActorSpec(models["policy"], reward=Lengths()), reference=False)
    scored = score_some(actors)
    assert not {"log_probs", "reference_log_probs", "token_kl"} & set(scored._fields), "what is unknown has no number"
    with pytest.raises(ValueError, match="this needs the reference model"):
        roll(actors)
    with pytest.raises(ValueError, match="this needs the reference model"):
        score_some(actors, reference_samples=2)


# --- statistics ---


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_a_policy_that_is_its_reference(models, temperature):
    rollout = roll(load(models, reference=models["policy"], temperature=temperature))
    assert (rollout.token_kl == 0).all()
    assert torch.equal(rollout.log_probs, rollout.reference_log_probs)
    ratio = (rollout.log_probs - rollout.completions.log_probs).exp()
    assert (ratio - 1).abs().max() < 1e-4


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_statistics_equal_an_independent_computation(models, temperature):
    actors = load(models, temperature=temperature)
    assert actors.reference is not None
    batch = prompts()
    rollout = roll(actors, batch)
    mask = rollout.completions.mask
    for name in ("log_probs", "reference_log_probs", "token_kl"):
        assert (getattr(rollout, name)[~mask] == 0).all()
    for place in range(3):
        prompt = batch.tokens[place][batch.mask[place]]
        for sample in range(6):
            response = rollout.completions.tokens[place, sample][mask[place, sample]]
            text = torch.cat([prompt, response])[None]
            with torch.no_grad():
                ours, theirs = (
                    (model(input_ids=text).logits[0, len(prompt) - 1 : -1].double() / temperature).softmax(-1)
                    for model in (actors.policy, actors.reference)
                )
            steps = torch.arange(len(response))
            kept = mask[place, sample]
            assert torch.allclose(
                rollout.log_probs[place, sample][kept].double(), ours[steps, response].log(), atol=1e-4
            )
            assert torch.allclose(
                rollout.reference_log_probs[place, sample][kept].double(), theirs[steps, response].log(), atol=1e-4
            )
            kl = (ours * (ours / theirs).log()).sum(-1)
            assert kl.max() > 0.01
            assert torch.allclose(rollout.token_kl[place, sample][kept].double(), kl, atol=1e-4)


def test_the_policy_alone_says_what_it_says_beside_its_reference(models):
    actors = load(models, temperature=0.7)
    rollout = roll(actors)
    assert torch.equal(actors.policy_log_probs(rollout), rollout.log_probs)
    assert not rollout.log_probs.eq(0).all()


def test_the_gradient_goes_to_the_policy_only(models):
    actors = load(models)
    assert actors.reference is not None
    rollout = score_some(actors)
    actors.reference.requires_grad_(True)
    live, _ = actors.statistics(rollout)
    (live.log_probs.sum() + live.token_kl.sum()).backward()
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in actors.policy.parameters())
    assert all(parameter.grad is None for parameter in actors.reference.parameters())
    assert not live.reference_log_probs.requires_grad
    assert not roll(actors).token_kl.requires_grad


def test_exact_kl_and_log_ratio_have_one_mean(models):
    actors = load(models, temperature=0.8)
    rollout = roll(actors, num_samples=3000)
    mask = rollout.completions.mask
    exact = rollout.token_kl.sum(-1).double()
    ratio = sequence_log_prob(kl_k1(rollout.log_probs, rollout.reference_log_probs), mask).double()
    difference = exact - ratio
    error = difference.std(-1) / 3000**0.5
    assert (exact.mean(-1) > 0.1).all()
    assert (difference.mean(-1).abs() < 4 * error).all()
    assert (error < 0.05 * exact.mean(-1)).all(), "otherwise the comparison shows nothing"
    assert (exact.std(-1) < ratio.std(-1)).all()


def test_completions_that_are_not_contiguous(models):
    actors = load(models)
    rollout = roll(actors)
    strided = Completions(*(part.transpose(0, 1).contiguous().transpose(0, 1) for part in rollout.completions))
    again, _ = actors.statistics(rollout._replace(completions=strided))
    assert torch.allclose(again.token_kl, rollout.token_kl)


def test_a_rollout_in_half_precision(models):
    actors = load(models)
    actors.policy.to(torch.bfloat16)
    rollout = roll(actors)
    for values in (rollout.rewards, rollout.log_probs, rollout.reference_log_probs, rollout.token_kl):
        assert values.dtype == torch.float32
        assert values.isfinite().all()
    assert (rollout.token_kl >= 0).all()


class Texts(RewardModel):
    """Rewards a response by a function of its text."""

    def __init__(self, of: Any) -> None:
        self.of = of

    def __call__(self, prompts: Any, responses: Any, token_ids: Any) -> Any:
        return [[self.of(text) for text in row] for row in responses]

    def identity(self) -> dict[str, str]:
        return {"name": "texts"}


HOW = {"num_samples": 4, "seed": 3, "stream": "train", "step": 0}


def test_several_workers_give_the_same_rollout(models: dict[str, str]) -> None:
    def parts(**settings: Any) -> Any:
        reward = WeightedReward({"length": Texts(len), "a": Texts(lambda text: float(text.count("a")))})
        actors = load(models, reward=reward, **settings)
        return actors.scored_responses(prompts(), reference_samples=5, **HOW)

    plain = parts()
    for settings in ({"max_rows": 4}, {"max_rows": 3}, {"max_rows": 100}, {}):
        found = parts(reward_calls=RewardCalls(workers=3), **settings)
        assert found.responses == plain.responses
        assert torch.equal(found.completions.tokens, plain.completions.tokens)
        assert torch.equal(found.rewards, plain.rewards)
        assert torch.equal(found.reference_rewards, plain.reference_rewards)
        assert {name: part.tolist() for name, part in found.reward_parts.items()} == {
            name: part.tolist() for name, part in plain.reward_parts.items()
        }


def test_a_pass_is_scored_while_the_next_is_sampled(models: dict[str, str]) -> None:
    begun, scoring = [threading.Event() for _ in range(4)], threading.Event()

    def after_the_next_pass_began(text: str) -> float:
        scoring.set()
        assert begun[1].wait(30), "the first pass is scored before the second is sampled"
        return float(len(text))

    def noting(*asked: Any) -> Completions:
        next(event for event in begun if not event.is_set()).set()
        assert not begun[1].is_set() or scoring.wait(30), "the second pass is sampled before the first is scored"
        return sample_completions(*asked)

    for reference_samples, max_rows in ((0, 4), (5, 20)):
        for event in (*begun, scoring):
            event.clear()
        reward = Texts(after_the_next_pass_began)
        actors = load(models, reward=reward, max_rows=max_rows, reward_calls=RewardCalls(workers=2))
        actors.sampler.sampler = noting
        found = actors.scored_responses(prompts(), reference_samples=reference_samples, **HOW)
        assert found.rewards.tolist() == [[len(text) for text in row] for row in found.responses]


def test_a_failing_reward_ends_a_rollout_and_its_threads(models: dict[str, str]) -> None:
    threads: set[threading.Thread] = set()

    def failing(text: str) -> float:
        threads.add(threading.current_thread())
        raise ConnectionError("out")

    actors = load(models, reward=Texts(failing), max_rows=4, reward_calls=RewardCalls(workers=2))
    with pytest.raises(RewardFailure, match="ConnectionError: out"):
        actors.scored_responses(prompts(), **HOW)
    for thread in threads:
        thread.join(30)
    assert threads and not any(thread.is_alive() for thread in threads)


def silent_on_a(text: str) -> float | None:
    return None if text.startswith("a") else float(len(text))


@pytest.mark.filterwarnings("ignore:the reward says None")
def test_missing_rewards_of_the_reference_are_drawn_again(models: dict[str, str]) -> None:
    how = HOW | {"num_samples": 40}
    some = load(models, reward=Texts(silent_on_a), reward_calls=RewardCalls(on_missing="skip"))
    found = some.reference_rewards(prompts(), **how)
    all_of_them = load(models, reward=Texts(len)).reference_rewards(prompts(), **how)
    assert found.shape == (3, 40)
    assert found.isfinite().all(), "M stays M"
    missing = (found != all_of_them).sum()
    assert some.record.missing > 0
    assert missing <= some.record.missing
    noise, streams = Actors.noise, []

    def noting(self: Actors, some: PromptBatch, **how: Any) -> Tensor:
        streams.append((int(some.index[0]), len(some.index), how["stream"]))
        return noise(self, some, **how)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Actors, "noise", noting)
        load(models, reward=Texts(silent_on_a), reward_calls=some.reward_calls).reference_rewards(prompts(), **how)
    assert streams[:2] == [(0, 3, "train"), (0, 1, "train/further1")]
    assert len(set(streams)) == len(streams), "no noise twice"
    again = load(models, reward=Texts(silent_on_a), reward_calls=RewardCalls(on_missing="skip", workers=2))
    assert torch.equal(again.reference_rewards(prompts((2, 0)), **how), found[[2, 0]]), "a prompt's own matter"


@pytest.mark.filterwarnings("ignore:the reward says None")
def test_a_prompt_whose_responses_have_no_reward_is_named(models: dict[str, str]) -> None:
    actors = load(models, reward=Texts(lambda text: None), reward_calls=RewardCalls(on_missing="skip"))
    with pytest.raises(RewardError, match=r"row 0, prompt '.*': 4 of its 4 responses have no reward, .* 16 further"):
        actors.reference_rewards(prompts(), **HOW)


def test_missing_rewards_are_counted_where_rows_count(models: dict[str, str]) -> None:
    actors = load(models, reward=Texts(lambda text: None), reward_calls=RewardCalls(on_missing="skip"))
    batch = prompts()
    batch.valid[1] = False
    with pytest.warns(UserWarning, match="the reward says None or NaN of response .* to prompt"):
        rollout = actors.rollout(batch, **HOW)
    assert actors.record.missing == 8
    assert not rollout.judged.any()
    with pytest.raises(RewardError, match="row 0, response 0 is nan"):
        load(models, reward=Texts(lambda text: None)).rollout(batch, **HOW)

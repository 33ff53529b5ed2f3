"""Sequence classifiers as rewards, against plain transformers one text at a time."""

from __future__ import annotations

import shutil
from pathlib import Path

import jsonargparse
import pytest
import torch
from tokenizers.processors import TemplateProcessing
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from tests import helpers
from vbon_lightning.models import ModelError
from vbon_lightning.rewards import ClassifierReward, RewardError, RewardModel

PROMPTS = ["One day, ", "The film "]
RESPONSES = [["Tom went", "x", "a much longer response"], ["was", "", "ended well, I think"]]


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> str:
    return helpers.save_tiny_classifier(tmp_path_factory.mktemp("bert"), "bert", labels=("NEG", "POS", "Mixed"))


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory: pytest.TempPathFactory) -> str:
    return helpers.save_tiny_classifier(tmp_path_factory.mktemp("gpt2"), "gpt2", pad=False)


@pytest.fixture(scope="module")
def scalar(tmp_path_factory: pytest.TempPathFactory) -> str:
    return helpers.save_tiny_classifier(tmp_path_factory.mktemp("scalar"), "bert", labels=("SCORE",))


def reference_logits(directory: str, texts: list[str]) -> torch.Tensor:
    """One text at a time, without padding."""
    model = AutoModelForSequenceClassification.from_pretrained(directory).eval()
    tokenizer = AutoTokenizer.from_pretrained(directory)
    with torch.no_grad():
        return torch.cat([model(input_ids=tokenizer(text, return_tensors="pt").input_ids).logits for text in texts])


def joined() -> list[str]:
    return [prompt + response for prompt, row in zip(PROMPTS, RESPONSES, strict=True) for response in row]


@pytest.mark.parametrize("kind", ["bert", "gpt2"])
@pytest.mark.parametrize("batch_size", [1, 4, 32])
def test_logits_are_those_of_plain_transformers(kind, batch_size, request):
    directory = request.getfixturevalue(kind)
    rewards = ClassifierReward(directory, batch_size=batch_size)(PROMPTS, RESPONSES, [])
    expected = reference_logits(directory, joined())[:, 1].view(2, 3)
    assert rewards.dtype == torch.float32 and not rewards.requires_grad
    assert expected.std() > 0.01  # the texts do differ
    torch.testing.assert_close(rewards, expected, rtol=0, atol=1e-5)


def test_log_odds_and_probability(bert):
    logits = reference_logits(bert, joined()).double()
    probability = logits.softmax(-1)[:, 2].view(2, 3)
    by_probability = ClassifierReward(bert, label=2, output="probability")(PROMPTS, RESPONSES)
    by_log_odds = ClassifierReward(bert, label=2, output="log_odds")(PROMPTS, RESPONSES)
    torch.testing.assert_close(by_probability.double(), probability, rtol=0, atol=1e-6)
    torch.testing.assert_close(by_log_odds.double(), torch.logit(probability), rtol=0, atol=1e-5)


def test_a_scalar_model_has_one_output_whatever_the_default_label(scalar):
    logits = reference_logits(scalar, joined())[:, 0].view(2, 3)
    for output, expected in (("logit", logits), ("log_odds", logits), ("probability", logits.sigmoid())):
        rewards = ClassifierReward(scalar, output=output)(PROMPTS, RESPONSES)
        torch.testing.assert_close(rewards, expected, rtol=0, atol=1e-5)
    with pytest.raises(RewardError, match="`label` is 2, but"):
        ClassifierReward(scalar, label=2)(PROMPTS, RESPONSES)


def test_independent_labels_use_the_sigmoid(tmp_path):
    directory = helpers.save_tiny_classifier(tmp_path, problem_type="multi_label_classification")
    logits = reference_logits(directory, joined())[:, 1].view(2, 3)
    probability = ClassifierReward(directory, output="probability")(PROMPTS, RESPONSES)
    torch.testing.assert_close(probability, logits.sigmoid(), rtol=0, atol=1e-5)
    torch.testing.assert_close(ClassifierReward(directory, output="log_odds")(PROMPTS, RESPONSES), logits)


def test_labels_by_name(bert):
    by_index = ClassifierReward(bert, label=2)(PROMPTS, RESPONSES)
    assert torch.equal(ClassifierReward(bert, label="Mixed")(PROMPTS, RESPONSES), by_index)
    assert torch.equal(ClassifierReward(bert, label="mixed")(PROMPTS, RESPONSES), by_index)
    assert not torch.equal(ClassifierReward(bert, label="POS")(PROMPTS, RESPONSES), by_index)
    with pytest.raises(RewardError, match="no label 'positive'; it has NEG, POS, Mixed"):
        ClassifierReward(bert, label="positive")(PROMPTS, RESPONSES)
    for label in (3, -1):
        with pytest.raises(RewardError, match="has 3 labels, 0 to 2"):
            ClassifierReward(bert, label=label)(PROMPTS, RESPONSES)


@pytest.mark.parametrize("kind", ["bert", "gpt2"])
def test_a_score_does_not_depend_on_its_neighbours(kind, request):
    reward = ClassifierReward(request.getfixturevalue(kind), text="response")
    alone = reward(["p"], [["ab"]])
    for neighbour in ("", "c", "d" * 60):
        torch.testing.assert_close(reward(["p"], [[neighbour, "ab"]])[:, 1:], alone, rtol=0, atol=1e-6)
        torch.testing.assert_close(reward(["p"], [["ab", neighbour]])[:, :1], alone, rtol=0, atol=1e-6)


def test_text_and_truncation(bert):
    alone = reference_logits(bert, [text for row in RESPONSES for text in row if text])[:, 1]
    rewards = ClassifierReward(bert, text="response")(PROMPTS, RESPONSES).flatten()
    torch.testing.assert_close(rewards[[0, 1, 2, 3, 5]], alone, rtol=0, atol=1e-5)
    cut = ClassifierReward(bert, text="response", max_length=3)(["p"], [["abc", "abcdef", "abd"]])
    torch.testing.assert_close(cut[0, 0], cut[0, 1], rtol=0, atol=1e-6)
    assert (cut[0, 0] - cut[0, 2]).abs() > 1e-4
    with pytest.raises(RewardError, match="row 0, response 1 takes 65 tokens of the reward model, which reads 64"):
        ClassifierReward(bert, text="response")(["p"], [["x" * 64, "x" * 65]])
    with pytest.raises(RewardError, match="`max_length` is 65, but the classifier takes at most 64"):
        ClassifierReward(bert, max_length=65)(PROMPTS, RESPONSES)


@pytest.mark.parametrize("template", ["$A", "<s> $A", "<s> $A </s>"])
@pytest.mark.parametrize("kind", ["bert", "gpt2"])
def test_a_prompt_that_fills_the_context_leaves_the_response(kind: str, template: str, tmp_path: Path) -> None:
    directory = helpers.save_tiny_classifier(tmp_path, kind)
    tokenizer = AutoTokenizer.from_pretrained(directory)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=template, special_tokens=[("<s>", helpers.BOS), ("</s>", helpers.EOS)]
    )
    tokenizer.save_pretrained(directory)
    room = 64 - template.count("<")
    prompt = "abcdefghij" * 10
    reward = ClassifierReward(directory)
    with pytest.warns(UserWarning, match="2 of 3 texts are longer than the 64 tokens .* the start of their prompt"):
        rewards = reward([prompt, "ab", prompt], [["xyz"], ["c"], ["zyx"]])
    # What is left is what a prompt without its start gives.
    for row, response in ((0, "xyz"), (2, "zyx")):
        expected = reference_logits(directory, [(prompt + response)[-room:]])[0, 1]
        torch.testing.assert_close(rewards[row, 0], expected, rtol=0, atol=1e-5)
    assert (rewards[0] - rewards[2]).abs() > 1e-4
    assert (reward.cut_prompts, reward.cut_responses) == (2, 0)


def test_a_response_that_is_too_long_by_itself_is_cut_only_where_asked_for(bert: str) -> None:
    with pytest.raises(RewardError, match="row 1, response 0 takes 70 tokens .* lower data.max_new_tokens"):
        ClassifierReward(bert)(["a", "ab"], [["y", "y"], ["x" * 70, "y"]])
    reward = ClassifierReward(bert, max_length=5)
    cut = reward(["ab"], [["abcdefg", "abcd"]])
    torch.testing.assert_close(cut[0], reference_logits(bert, ["abcde", "babcd"])[:, 1], rtol=0, atol=1e-5)
    assert (reward.cut_prompts, reward.cut_responses) == (1, 1)


@pytest.mark.parametrize("limit", [None, 6])
def test_a_written_bos_gets_no_other(tmp_path: Path, limit: int | None) -> None:
    """A rendered conversation begins with the BOS that the classifier's tokenizer adds: it is read with one."""
    directory = helpers.save_tiny_classifier(tmp_path, "gpt2")
    tokenizer = AutoTokenizer.from_pretrained(directory)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", helpers.BOS)]
    )
    tokenizer.save_pretrained(directory)
    reward = ClassifierReward(directory, max_length=limit, rendered=True)
    written, plain, other = reward(["<s>abcdef", "abcdef", "bacdef"], [["gh"]] * 3)[:, 0].tolist()
    assert written == plain
    assert (written == other) is (limit == 6), "cut to 6, the BOS and cdefgh are left"


def test_it_is_frozen_deterministic_and_loaded_at_the_first_call(tmp_path):
    directory = helpers.save_tiny_classifier(tmp_path, hidden_dropout_prob=0.5, attention_probs_dropout_prob=0.5)
    reward = ClassifierReward(directory)
    assert reward._loaded is None
    first = reward(PROMPTS, RESPONSES)
    model = reward._loaded[0]
    assert not model.training and not any(parameter.requires_grad for parameter in model.parameters())
    model.train()  # even so
    assert torch.equal(reward(PROMPTS, RESPONSES), first)


def test_the_trainers_precision_does_not_reach_it(bert):
    reward = ClassifierReward(bert)
    plain = reward(PROMPTS, RESPONSES)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(reward(PROMPTS, RESPONSES), plain)


def test_a_checkpoint_without_a_trained_head_is_refused(tmp_path):
    # transformers would score by a random head and only warn.
    directory = helpers.save_tiny_model(tmp_path, "gpt2")
    with pytest.raises(ModelError, match="lacks 1 weights .*score.weight.*would be random"):
        ClassifierReward(directory)(PROMPTS, RESPONSES)


def test_bad_arguments(bert, tmp_path):
    for arguments, message in (
        ({"output": "score"}, "`output` is 'score'"),
        ({"text": "both"}, "`text` is 'both'"),
        ({"batch_size": 0}, "`batch_size` is 0"),
        ({"max_length": 0}, "`max_length` is 0"),
    ):
        with pytest.raises(RewardError, match=message):
            ClassifierReward(bert, **arguments)
    with pytest.raises(ModelError, match="unknown dtype"):
        ClassifierReward(bert, dtype="int8")
    with pytest.raises(ModelError, match="`model`: the directory .* does not exist"):
        ClassifierReward(str(tmp_path / "gone"))(PROMPTS, RESPONSES)
    with pytest.raises(RewardError, match="same number of responses"):
        ClassifierReward(bert)(PROMPTS, [["a"], ["b", "c"]])


def test_no_prompts(bert):
    assert ClassifierReward(bert)([], [], []).shape == (0, 0)


def test_identity_is_what_changes_the_rewards(bert, tmp_path):
    identity = ClassifierReward(bert).identity()
    copy = shutil.copytree(bert, tmp_path / "copy")
    assert ClassifierReward(str(copy), batch_size=3).identity() == identity
    for arguments in (
        {"label": 0},
        {"output": "log_odds"},
        {"text": "response"},
        {"max_length": 5},
        {"dtype": "auto"},
    ):
        assert ClassifierReward(bert, **arguments).identity() != identity
    assert all(isinstance(value, str) for value in identity.values())


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("ClassifierReward", {"model": "owner/model", "label": "POSITIVE", "output": "log_odds"}),
        ("VaderReward", {"text": "response"}),
        ("CallableReward", {"function": "a.b.c", "arguments": {"scale": 2.0}}),
    ],
)
def test_yaml_can_name_every_reward(name, arguments):
    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    parser.add_argument("--reward", type=RewardModel)
    parsed = parser.parse_object({"reward": {"class_path": f"vbon_lightning.rewards.{name}", "init_args": arguments}})
    reward = parser.instantiate(parsed).reward if hasattr(parser, "instantiate") else None
    reward = reward or parser.instantiate_classes(parsed).reward
    assert type(reward).__name__ == name
    for key, value in arguments.items():
        assert getattr(reward, key) == value


def test_a_suffix_goes_behind_every_text_and_is_read(gpt2):
    expected = reference_logits(gpt2, [text + "</s>" for text in joined()])[:, 1].view(2, 3)
    reward = ClassifierReward(gpt2, suffix="</s>", tokenizer=_padded(gpt2))
    torch.testing.assert_close(reward(PROMPTS, RESPONSES), expected, rtol=0, atol=1e-5)
    plain = ClassifierReward(gpt2, tokenizer=_padded(gpt2))(PROMPTS, RESPONSES)
    assert (plain - expected).abs().min() > 1e-4
    # A long text loses its start, not the suffix.
    cut = ClassifierReward(gpt2, suffix="</s>", tokenizer=_padded(gpt2), max_length=8)(["abcdefg"], [["h", "xyz"]])
    kept = reference_logits(gpt2, ["bcdefgh</s>", "defgxyz</s>"])[:, 1].view(1, 2)
    torch.testing.assert_close(cut, kept, rtol=0, atol=1e-5)
    assert ClassifierReward(gpt2, suffix="x").identity() != ClassifierReward(gpt2).identity()
    assert "suffix" not in ClassifierReward(gpt2).identity()  # tables made before there was one stay valid


def test_a_suffix_that_would_not_be_read_is_refused(gpt2):
    with pytest.raises(RewardError, match="ends in the tokenizer's pad token, .*`tokenizer` with a pad token of its"):
        ClassifierReward(gpt2, suffix="</s>")(PROMPTS, RESPONSES)  # pads by its EOS
    with pytest.raises(RewardError, match="has 3 tokens, which leaves no room for text in 3"):
        ClassifierReward(gpt2, suffix="abc", max_length=3)(PROMPTS, RESPONSES)


def _padded(directory: str) -> str:
    """Save the same tokenizer with its pad token beside a model that has none, and return where."""
    target = f"{directory}/padded"
    helpers.tiny_tokenizer(target)
    return target


def test_a_special_token_that_a_text_spells_is_text(tmp_path: Path) -> None:
    """A model that writes the letters of an end token gets no reward for the token; a template's marks are its own."""
    directory = helpers.save_tiny_classifier(tmp_path, "gpt2")
    tokenizer = AutoTokenizer.from_pretrained(directory)
    model = AutoModelForSequenceClassification.from_pretrained(directory).eval()
    end = [tokenizer.eos_token_id]

    def logit(ids: list[int]) -> float:
        return float(model(torch.tensor([ids])).logits[0, 1])

    def letters(text: str) -> list[int]:
        return [ids for letter in text for ids in tokenizer(letter)["input_ids"]]

    reward = ClassifierReward(directory)
    assert float(reward(["a</s>"], [["b</s>c"]])) == pytest.approx(logit(letters("a</s>b</s>c")), abs=1e-5)
    rendered = ClassifierReward(directory, rendered=True)
    expected = logit([*letters("a"), *end, *letters("b</s>c")])
    assert float(rendered(["a</s>"], [["b</s>c"]])) == pytest.approx(expected, abs=1e-5)
    assert rendered.identity() != reward.identity(), "its rewards are others"

    tokenizer.chat_template = "{% for one in messages %}{{ one.content }}</s>{% endfor %}"
    tokenizer.save_pretrained(directory)
    said = {"messages": [[{"role": "user", "content": "a</s>"}]]}
    expected = logit([*letters("a</s>"), *end, *letters("b</s>c"), *end])
    chat = ClassifierReward(directory)
    assert float(chat(["?"], [["b</s>c"]], columns=said)) == pytest.approx(expected, abs=1e-5)
    short = ClassifierReward(directory, max_length=4)  # cut on the prompt's side, the response's tokens stay
    assert float(short(["?"], [["b"]], columns=said)) == pytest.approx(
        logit([*letters(">"), *end, *letters("b"), *end]), abs=1e-5
    )

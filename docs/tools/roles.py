"""Griffe extension: docstrings' roles, such as ``:class:`~a.b.C```, as Markdown."""

from __future__ import annotations

import re
from typing import Any

from griffe import Extension, Object

_ROLE = re.compile(r":(?:class|func|meth|mod|attr|data|math):`(?P<short>~)?(?P<text>[^`]+)`")


def as_markdown(text: str) -> str:
    """Replace roles by code: of ``~a.b.C`` the last part."""
    return _ROLE.sub(lambda match: f"`{match['text'].split('.')[-1] if match['short'] else match['text']}`", text)


class Roles(Extension):
    """Rewrites every docstring that is read."""

    def on_object(self, *, obj: Object, **kwargs: Any) -> None:
        """Rewrite an object's docstring."""
        if obj.docstring is not None:
            obj.docstring.value = as_markdown(obj.docstring.value)

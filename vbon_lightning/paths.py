"""Turn what a YAML file says about a place into a path."""

from __future__ import annotations

import importlib.util
import os
import re
from pathlib import Path

PACKAGE_PREFIX = "package:"

_VARIABLE = re.compile(r"\$\{([A-Za-z_][A-Za-z0-9_]*)\}")


class PathError(ValueError):
    """A path in the configuration that cannot be resolved."""


def resolve_path(text: str) -> str:
    """Expand ``${VAR}``, a leading ``~`` and ``package:NAME/path/inside``; leave the rest as it is.

    Args:
        text: A path, a hub name, or ``package:NAME/path/inside`` for a file or directory that ships inside an
            installed Python package. The package is located, not imported.

    Returns:
        The expanded text. Only the ``package:`` form is guaranteed to exist and to be absolute.

    Raises:
        PathError: If the text is blank, a variable is not set, or the package or the file inside it does not exist.
    """
    if not text.strip():
        raise PathError(f"the path {text!r} is blank: it would mean the current directory, which is named as '.'")
    expanded = _VARIABLE.sub(lambda match: _variable(match.group(1), text), text)
    if expanded.startswith(PACKAGE_PREFIX):
        return _inside_package(expanded.removeprefix(PACKAGE_PREFIX), text)
    return os.path.expanduser(expanded)


def looks_like_path(text: str) -> bool:
    """Say whether ``text`` can only be a path, since a hub name is ``name`` or ``owner/name``.

    Args:
        text: The text, already expanded by :func:`resolve_path`.
    """
    return text.startswith((".", "~", os.sep)) or text.endswith("/") or text.count("/") > 1 or "\\" in text


def public_name(name: str) -> tuple[str, bool]:
    """Return a name as others may read it, and whether it is one of the hub.

    Somebody's directories mean nothing to the reader, and may be private: of a path only the last name is kept.

    Args:
        name: A path, a URL, ``package:NAME/path/inside``, or a name on the hub.
    """
    path = Path(name).expanduser()
    is_local = path.is_absolute() or path.exists() or len(path.parts) > 2 or ":" in name or looks_like_path(name)
    return (path.name if is_local else name), not is_local


def _variable(name: str, text: str) -> str:
    value = os.environ.get(name)
    if not value:
        raise PathError(f"environment variable {name} is not set, but {text!r} uses it: set it, or write the path out")
    return value


def _inside_package(location: str, text: str) -> str:
    package, _, inside = location.partition("/")
    if not package or ".." in Path(inside).parts:
        raise PathError(f"{text!r} should read package:NAME/path/inside, without '..'")
    try:
        spec = importlib.util.find_spec(package)
    except (ImportError, ValueError) as error:
        raise PathError(f"cannot look for the package of {text!r}: {error}") from error
    if spec is None:
        raise PathError(
            f"{text!r} names the package {package!r}, which is not installed: install it (pip install ...), "
            "or give a directory instead"
        )
    roots = [Path(root) for root in spec.submodule_search_locations or []]
    if not roots:
        raise PathError(f"{text!r}: {package!r} is a single module, with no files inside it")
    for root in roots:
        if (root / inside).exists():
            return str((root / inside).absolute())
    found = sorted(entry.name for root in roots if root.is_dir() for entry in root.iterdir())
    raise PathError(f"{text!r}: the package {package!r} holds no {inside!r}; it holds {', '.join(found[:12])}")

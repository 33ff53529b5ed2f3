"""SHA-256 sums of a model's weights, in a file beside them: a byte that was changed on the way is found."""

from __future__ import annotations

import functools
import hashlib
import os
import re
from pathlib import Path

from vbon_lightning.models.errors import ModelError

SUMS = "SHA256SUMS"
"""Name of the file, as ``sha256sum`` writes and reads it."""

_LINE = re.compile(r"(?P<sum>[0-9a-f]{64}) [ *](?P<name>.+)")


def write_sums(directory: Path) -> None:
    """Write down the sums of all safetensors files in a directory and below."""
    names = sorted(path.relative_to(directory).as_posix() for path in directory.rglob("*.safetensors"))
    lines = [f"{hash_file(directory / name)}  {name}\n" for name in names]
    (directory / SUMS).write_text("".join(lines), encoding="utf-8")


def check_sums(directory: str | Path, field: str = "name") -> None:
    """Refuse a directory whose weights are not those that were written; one without sums is taken as it is.

    Args:
        directory: The directory.
        field: The field it was given in, for the message.

    Raises:
        ModelError: Naming the file.
    """
    sums = Path(directory, SUMS)
    if not sums.is_file():
        return
    lines = sums.read_text(encoding="utf-8", errors="replace").splitlines()
    known = [found for line in lines if (found := _LINE.fullmatch(line))]
    named = {found["name"] for found in known}
    left_out = sorted({path.name for path in Path(directory).glob("*.safetensors")} - named)
    if left_out and (len(known) < len(lines) or any(name.endswith(".safetensors") for name in named)):
        raise ModelError(
            f"`{field}`: {str(sums)!r} is damaged: it has no sum of {left_out[0]}. Copy the model again, or remove "
            f"{SUMS} to take it as it is"
        )
    for found in known:
        path = Path(directory, found["name"])
        if not path.is_file():
            continue  # a missing file is the loader's to report
        if hash_file(path) != found["sum"]:
            raise ModelError(
                f"`{field}`: {str(path)!r} is not the file that was exported, its SHA-256 sum is another: copy it "
                f"again, or remove {SUMS} beside it if you changed the weights on purpose"
            )


def hash_file(path: str | os.PathLike[str]) -> str:
    """Return the SHA-256 sum of a file, in hexadecimal."""
    # The cache is keyed by size and time too, so that a rewritten file is read again.
    status = os.stat(path)
    return _hash_content(os.path.abspath(path), status.st_size, status.st_mtime_ns)


@functools.lru_cache(maxsize=256)
def _hash_content(path: str, size: int, modified: int) -> str:
    del size, modified
    with open(path, "rb") as file:
        digest = hashlib.sha256()
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()

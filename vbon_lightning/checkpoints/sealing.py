"""A digest inside the file that it is of: PyTorch's zip archive with the sum of its bytes as the archive's comment.

``torch.load`` reads such a file as any other, and a copy of the one file takes its digest along.
"""

from __future__ import annotations

import hashlib
import os
import zipfile
import zlib
from typing import IO, Any, cast

import torch

_LABEL = b"vbon_lightning sha256 "
_COMMENT = len(_LABEL) + 64
_END = b"PK\x05\x06"  # of the archive's last record, whose last two bytes are the comment's length
_END_SIZE = 22
_BLOCK = 1 << 22


class CheckpointError(ValueError):
    """A checkpoint that is broken, or is none."""


class _Summing:
    """Pass what is written to a stream, and add it up.

    PyTorch's writer makes another error of one that a write raises: the first is kept, to be raised when it is done.
    """

    def __init__(self, stream: IO[bytes]) -> None:
        self.stream, self.digest = stream, hashlib.sha256()
        self.problem: OSError | None = None

    def write(self, data: Any) -> int:
        if self.problem is None:
            try:
                self.stream.write(data)
                self.digest.update(data)
            except OSError as problem:
                self.problem = problem
        return len(data)

    def flush(self) -> None:
        if self.problem is None:
            self.stream.flush()


def write_sealed(content: Any, stream: IO[bytes]) -> None:
    """Write what ``torch.save`` takes, and a digest of it, to a stream that is empty and can be sought in.

    Args:
        content: What to save.
        stream: Where to.

    Raises:
        OSError: As the stream raises it, such as for a disk that is full.
    """
    summing = _Summing(stream)
    torch.save(content, cast("IO[bytes]", summing))
    if summing.problem is not None:
        raise summing.problem
    stream.seek(-2, os.SEEK_END)
    stream.write(_COMMENT.to_bytes(2, "little") + _LABEL + summing.digest.hexdigest().encode())


def check_seal(stream: IO[bytes], name: str) -> bool:
    """Compare a file with the digest that it holds; where it has none, with the check sums of its parts.

    Args:
        stream: The file, to be read from its start; it is left there.
        name: Its name, for the message.

    Returns:
        Whether it has a digest.

    Raises:
        CheckpointError: If it is no checkpoint, cut short, or its bytes are others than were written.
    """
    size = stream.seek(0, os.SEEK_END)
    stream.seek(0)
    start = stream.read(16)
    if size == 0:
        raise CheckpointError(f"the checkpoint {name} is empty: {_ANOTHER}")
    if not start.startswith(b"PK\x03\x04"):
        raise CheckpointError(f"{name} is {_what_else(start, size)}")
    stream.seek(max(0, size - _END_SIZE - _COMMENT))
    end = stream.read()
    stream.seek(0)
    if end[-_END_SIZE:].startswith(_END) and end.endswith(b"\0\0"):
        _check_parts(stream, name)
        stream.seek(0)
        return False
    sealed = _COMMENT.to_bytes(2, "little") + _LABEL
    if not end.startswith(_END) or end[_END_SIZE - 2 :][: len(sealed)] != sealed:
        raise CheckpointError(f"the checkpoint {name} is cut short or damaged at its end ({size:,} bytes): {_ANOTHER}")
    if _sum_of(stream, size - _COMMENT - 2) != end[-64:]:
        raise CheckpointError(
            f"the checkpoint {name} is damaged: its contents are not those that were written (their SHA-256 sum is "
            f"another); {_ANOTHER}"
        )
    stream.seek(0)
    return True


_ANOTHER = "resume from another checkpoint, or copy it again"


def _sum_of(stream: IO[bytes], size: int) -> bytes:
    """Return the sum of a file's first bytes, with the comment's length as it was before there was a comment."""
    digest = hashlib.sha256()
    while size and (block := stream.read(min(size, _BLOCK))):
        digest.update(block)
        size -= len(block)
    digest.update(b"\0\0")
    return digest.hexdigest().encode()


def _check_parts(stream: IO[bytes], name: str) -> None:
    try:
        with zipfile.ZipFile(stream) as archive:
            # PyTorch takes a part that is marked as a directory for an empty one.
            marked = next((part.filename for part in archive.infolist() if part.external_attr), None)
            damaged = marked or archive.testzip()
    except (zipfile.BadZipFile, zlib.error, EOFError, OSError, ValueError, NotImplementedError) as problem:
        raise CheckpointError(f"the checkpoint {name} is damaged ({problem}): {_ANOTHER}") from problem
    if damaged is not None:
        raise CheckpointError(
            f"the checkpoint {name} is damaged: its part {damaged} is not what was written; {_ANOTHER}"
        )


def _what_else(start: bytes, size: int) -> str:
    if start[8:9] == b"{" and int.from_bytes(start[:8], "little") < size:
        return (
            "a safetensors file, which holds weights only, and no checkpoint of a run: give the directory that it is "
            "in as `data.policy` to start from it"
        )
    return f"no checkpoint, or damaged at its start (it begins with the bytes {start[:4].hex(' ')}): {_ANOTHER}"

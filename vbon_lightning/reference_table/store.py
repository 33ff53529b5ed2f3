"""Where a table lies: a directory, or a folder of an object store behind a URL that fsspec knows."""

from __future__ import annotations

import errno
import shutil
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, BinaryIO, cast

import fsspec
from fsspec.asyn import AsyncFileSystem

from vbon_lightning._json_lines import is_url
from vbon_lightning.whole_files import atomic_file, sync_directory

_IN_MEMORY = 64 * 2**20
"""Bytes of a file for a store that are kept in memory until it is whole; the rest waits on the local disk."""
_NO_SPACE = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_READ_ONLY = {errno.EROFS, errno.EACCES, errno.EPERM}
_WITHOUT_DRIVER = {"s3": "s3fs", "s3a": "s3fs", "gs": "gcsfs", "gcs": "gcsfs", "az": "adlfs", "abfs": "adlfs"}


class TableStoreError(OSError):
    """A place that cannot be read or written: no driver, no such bucket, no credentials, no space."""


@dataclass(frozen=True)
class UrlPath:
    """A file or folder of a store, with what the table uses of :class:`pathlib.Path`.

    Nothing is remembered of what the store holds: other processes write to it. The driver is looked up at each use,
    which costs nothing and lets the path cross into other processes.
    """

    url: str

    def __str__(self) -> str:
        """Return the URL."""
        return self.url

    def __truediv__(self, name: str) -> UrlPath:
        """Return what is called so inside."""
        return UrlPath(f"{self.url.rstrip('/')}/{name}")

    @property
    def name(self) -> str:
        """The last part of the URL."""
        return self.url.rstrip("/").rpartition("/")[2]

    @property
    def suffix(self) -> str:
        """The end of the name, with its dot."""
        return Path(self.name).suffix

    def iterdir(self) -> Iterator[UrlPath]:
        """Yield what the folder holds; nothing where there is none, for a store has no empty folders."""
        with self._reached() as (files, path):
            try:
                found = files.ls(path, detail=False)
            except FileNotFoundError:
                found = []
        return (self / name for name in {entry.rstrip("/").rpartition("/")[2] for entry in found} if name)

    def exists(self) -> bool:
        """Tell whether there is such a file or folder."""
        with self._reached() as (files, path):
            return bool(files.exists(path))

    def is_dir(self) -> bool:
        """Tell whether there is such a folder, with something in it."""
        with self._reached() as (files, path):
            return bool(files.isdir(path))

    def mkdir(self, *, parents: bool = True, exist_ok: bool = True) -> None:
        """Make the folder where the store has any; a bucket is never made."""
        with self._reached() as (files, path):
            if not _puts_whole(files):
                files.makedirs(path, exist_ok=exist_ok)

    def open(self) -> IO[bytes]:
        """Open the file to read parts of it."""
        with self._reached() as (files, path):
            return cast("IO[bytes]", files.open(path, "rb"))

    def read_bytes(self) -> bytes:
        """Read the file."""
        with self._reached() as (files, path):
            return bytes(files.cat_file(path))

    def read_text(self, encoding: str = "utf-8") -> str:
        """Read the file as text."""
        return self.read_bytes().decode(encoding)

    def unlink(self, *, missing_ok: bool = True) -> None:
        """Remove the file if it is there; a store does not say whether it was."""
        with self._reached() as (files, path), suppress(FileNotFoundError):
            files.rm_file(path)

    def write_bytes(self, content: bytes) -> None:
        """Put a file whole, over one that may be there."""
        with self.written_whole() as stream:
            stream.write(content)

    @contextmanager
    def written_whole(self) -> Iterator[BinaryIO]:
        """Open a file that is put when it is complete; an object store shows it whole or not at all."""
        with tempfile.SpooledTemporaryFile(_IN_MEMORY) as stream:
            yield cast("BinaryIO", stream)
            size = stream.tell()
            stream.seek(0)
            with self._reached(writing=True) as (files, path):
                there = path if _puts_whole(files) else f"{path}.{uuid.uuid4().hex[:8]}.tmp"
                if size <= _IN_MEMORY:
                    files.pipe_file(there, stream.read())
                else:
                    with tempfile.NamedTemporaryFile() as local:
                        shutil.copyfileobj(stream, local)
                        local.flush()
                        files.put_file(local.name, there)
                if there != path:
                    files.mv(there, path)

    def create(self, content: bytes) -> bool:
        """Put a file unless there is one, and tell whether it was put.

        Exactly one of several succeeds where the store has conditional puts, as those of Amazon, Google and Microsoft.
        """
        with self._reached(writing=True) as (files, path):
            try:
                files.pipe_file(path, content, mode="create")
                return True
            except FileExistsError:
                return False
            except (TypeError, NotImplementedError):
                if files.exists(path):
                    return False
                files.pipe_file(path, content)
                return True

    @contextmanager
    def _reached(self, *, writing: bool = False) -> Iterator[tuple[Any, str]]:
        with telling(self, writing=writing):
            files, path = fsspec.core.url_to_fs(self.url)
            files.invalidate_cache()
            try:
                yield files, path
            except FileNotFoundError as problem:
                if not writing:
                    raise
                message = f"{self} cannot be written: {problem}. Make the bucket, or name one that is there"
                raise _error(message, problem.errno) from problem


def _puts_whole(files: Any) -> bool:
    """Tell an object store, which shows a file when all of it is there, from a file system."""
    return isinstance(files, AsyncFileSystem)


TablePath = Path | UrlPath
"""Where a table or a file of it lies."""


def table_path(path: str | Path | UrlPath) -> TablePath:
    """Return a path of this machine, or the URL of a store as one.

    Args:
        path: a directory or file, or a URL such as ``s3://bucket/table``.
    """
    if isinstance(path, UrlPath):
        return path
    text = str(path)
    for prefix in ("file://", "local://"):
        if text.startswith(prefix):
            return Path(text.removeprefix(prefix))
    return UrlPath(text.rstrip("/")) if is_url(text) else Path(path)


@contextmanager
def table_file(path: TablePath, temporary: Path | None = None) -> Iterator[BinaryIO]:
    """Open a file of a table that appears under its name only when it is complete and on the disk, or in the store.

    Args:
        path: the name to appear.
        temporary: where it is written until then, in the same directory; default ``.<name>.tmp``. A store needs none.

    Yields:
        A binary stream.
    """
    with path.written_whole() if isinstance(path, UrlPath) else atomic_file(path, temporary) as stream:
        yield stream


def make_folder(folder: TablePath) -> None:
    """Make the folder of a table, where there is none.

    Raises:
        TableStoreError: if there is something else in its place.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, FileNotFoundError, NotADirectoryError) as problem:
        message = f"{folder} cannot be the directory of a table ({problem.strerror or problem}): name another place"
        raise _error(message, problem.errno) from problem


def sync_folder(folder: TablePath) -> None:
    """Put a folder's entries on the disk; a store has them already."""
    if isinstance(folder, Path):
        sync_directory(folder)


def create_file(path: TablePath, content: bytes) -> bool:
    """Write a small file unless there is one; of several that try exactly one is told that it did.

    Args:
        path: the file.
        content: what to write; a kill in between may leave less of it on a disk.
    """
    if isinstance(path, UrlPath):
        return path.create(content)
    try:
        with path.open("xb") as stream:
            stream.write(content)
    except FileExistsError:
        return False
    return True


@contextmanager
def telling(path: TablePath, *, writing: bool) -> Iterator[None]:
    """Say in one line what is wrong with a place and what to do.

    Args:
        path: the place.
        writing: whether it is to be written.

    Raises:
        FileNotFoundError: as it comes.
        TableStoreError: for everything else that a disk or a store has to say.
    """
    try:
        yield
    except (FileNotFoundError, TableStoreError):
        raise
    except OSError as problem:
        message = _message(path, problem, writing=writing)
        if message is None:
            raise
        raise _error(message, problem.errno) from problem
    except Exception as problem:
        if isinstance(path, Path) or not _of_a_driver(problem):
            raise
        raise _error(_driver_message(path, problem), None) from problem


def _of_a_driver(problem: Exception) -> bool:
    """Tell what fsspec and its drivers say (botocore, aiohttp, google) from what the code in between does."""
    if isinstance(problem, ImportError) or str(problem).startswith("Protocol not known"):
        return True
    return type(problem).__module__.partition(".")[0] not in ("builtins", "pyarrow", "vbon_lightning")


def _error(message: str, number: int | None) -> TableStoreError:
    error = TableStoreError(message)
    error.errno = number
    return error


def _message(path: TablePath, problem: OSError, *, writing: bool) -> str | None:
    if problem.errno in _NO_SPACE:
        return (
            f"{path} cannot be written: {problem.strerror or problem}. What was written before is complete; make room "
            "(or raise the quota) and run the same command again: it goes on with what is missing"
        )
    if problem.errno in _READ_ONLY or isinstance(problem, PermissionError):
        what = "written" if writing else "read"
        return f"{path} cannot be {what}: {problem.strerror or problem}. Ask for the right to, or name another place"
    if isinstance(path, Path):
        return None
    if problem.errno is None:  # what a library says of a file's content
        return None
    return _driver_message(path, problem)


def _driver_message(path: TablePath, problem: Exception) -> str:
    protocol = str(path).partition("://")[0]
    reason = " ".join(str(problem).split()) or type(problem).__name__
    if isinstance(problem, ImportError):
        driver = _WITHOUT_DRIVER.get(protocol, "the package it names")
        return f"{path} cannot be reached: {reason} (pip install {driver})"
    if isinstance(problem, ValueError) and reason.startswith("Protocol not known"):
        return f"{path} cannot be reached: fsspec knows no {protocol}://; mistyped, or a driver to be installed?"
    if "redential" in type(problem).__name__ + reason:
        return (
            f"{path} cannot be reached: {reason}. Give them as its driver expects them: for s3:// the environment "
            "variables AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or ~/.aws/credentials"
        )
    return f"{path} cannot be reached: {reason}. Check the address, the network and the credentials, and try again"

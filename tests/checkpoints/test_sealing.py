"""A digest inside its file: every byte that is changed or lost is found, and PyTorch reads it all the same."""

from __future__ import annotations

import errno
import io
from contextlib import suppress
from typing import Any

import pytest
import torch
from safetensors.torch import save as save_safetensors

from vbon_lightning.checkpoints.sealing import CheckpointError, check_seal, write_sealed

CONTENT = {"weights": torch.arange(6.0).view(2, 3), "step": 3, "name": "a"}


def sealed(content: Any = CONTENT) -> bytes:
    stream = io.BytesIO()
    write_sealed(content, stream)
    return stream.getvalue()


def unsealed(content: Any = CONTENT) -> bytes:
    stream = io.BytesIO()
    torch.save(content, stream)
    return stream.getvalue()


def check(data: bytes) -> bool:
    return check_seal(io.BytesIO(data), "run/last.ckpt")


def test_torch_reads_it_as_any_other() -> None:
    data = sealed()
    assert check(data)
    for found in (torch.load(io.BytesIO(data), weights_only=True), torch.load(io.BytesIO(unsealed()))):
        assert torch.equal(found["weights"], CONTENT["weights"]) and found["step"] == 3
    stream = io.BytesIO(data)
    check_seal(stream, "a")
    assert stream.tell() == 0


def test_every_flipped_byte_is_found() -> None:
    data = bytearray(sealed({"w": torch.ones(2)}))
    for place in range(len(data)):
        data[place] ^= 0x10
        with pytest.raises(CheckpointError, match=r"run/last\.ckpt"):
            check(bytes(data))
        data[place] ^= 0x10
    assert check(bytes(data))


def test_every_shorter_or_longer_file_is_found() -> None:
    data = sealed({"w": torch.ones(2)})
    for size in range(len(data)):
        with pytest.raises(CheckpointError, match=r"run/last\.ckpt"):
            check(data[:size])
    for more in (b"\0", b"\0" * 22, data):
        with pytest.raises(CheckpointError, match=r"run/last\.ckpt"):
            check(data + more)


def test_one_without_a_digest_is_checked_by_its_parts() -> None:
    whole = unsealed()
    assert not check(whole)
    changed = 0
    for place in range(len(whole)):
        data = bytearray(whole)
        data[place] ^= 0x10
        try:
            check(bytes(data))
        except CheckpointError:
            changed += 1
        else:  # between the parts, where nothing is read, or what PyTorch itself refuses
            found = None
            with suppress(Exception):
                found = torch.load(io.BytesIO(bytes(data)), weights_only=True)
            assert found is None or (torch.equal(found["weights"], CONTENT["weights"]) and found["step"] == 3)
    assert changed > 200
    with pytest.raises(CheckpointError, match="cut short"):
        check(whole[:-1])


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "is empty"),
        (b"\x80\x02garbage" * 9, "no checkpoint, or damaged at its start .it begins with the bytes 80 02 67 61"),
        (save_safetensors({"a": torch.ones(2)}), r"is a safetensors file.*`data\.policy`"),
        (b"PK\x03\x04", "cut short"),
        (b"\0" * 500, "no checkpoint"),
    ],
    ids=["empty", "random", "safetensors", "header", "zeros"],
)
def test_what_is_no_checkpoint(data: bytes, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        check(data)


@pytest.mark.parametrize("room", [0, 100, 400, 1000])
def test_a_full_disk_is_named_as_such(room: int) -> None:
    class Full(io.BytesIO):
        def write(self, data: Any) -> int:
            if self.tell() + len(data) > room:
                raise OSError(errno.ENOSPC, "No space left on device")
            return super().write(data)

    with pytest.raises(OSError, match="No space left"):
        write_sealed(CONTENT, Full())

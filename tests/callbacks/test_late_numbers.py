"""Numbers that are read a step late on a GPU, and at once on a CPU."""

from __future__ import annotations

import pytest
import torch

from vbon_lightning.callbacks.late_numbers import LateNumbers
from vbon_lightning.finite import largest


def test_on_a_cpu_they_are_read_at_once() -> None:
    read: list[tuple[list[float], str]] = []
    late: LateNumbers[str] = LateNumbers(lambda values, note: read.append((values.tolist(), note)))
    late.put(torch.ones(2), "a")
    assert read == [([1.0, 1.0], "a")]
    late.settle()
    late.forget()
    assert len(read) == 1


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu_they_are_read_when_the_next_ones_come() -> None:
    read: list[str] = []
    late: LateNumbers[str] = LateNumbers(lambda values, note: read.append(f"{note} {values.tolist()} {values.device}"))
    torch.cuda.set_sync_debug_mode("error")
    try:
        gradients = [torch.ones(3, device="cuda"), torch.full((4,), 2.0, device="cuda")]
        late.put(largest(gradients)[1:], "a")
        assert not read
        late.put(torch.full((1,), 3.0, device="cuda"), "b")
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert read == ["a [2.0] cpu"]
    late.settle()
    assert read[1:] == ["b [3.0] cpu"]
    late.put(torch.ones(1, device="cuda"), "c")
    late.forget()
    late.settle()
    assert len(read) == 2

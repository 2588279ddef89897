"""Memory that is there before it is written."""

from __future__ import annotations

import mmap
import resource
import sys

import pytest
import torch

from lowbit.kernels import host_memory
from lowbit.kernels.host_memory import PIECE, populate, zeros


def faults() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt


def knows_how() -> bool:
    return sum(1 for _ in populate(zeros((1 << 16,), torch.uint8))) > 0


@pytest.mark.skipif(sys.platform != "linux", reason="asks as Linux answers")
def test_writing_populated_memory_faults_nothing() -> None:
    if not knows_how():
        pytest.skip("this kernel has no MADV_POPULATE_WRITE")
    size = 3 * PIECE + 4096 * 5

    def fresh() -> torch.Tensor:
        memory = mmap.mmap(-1, size + 8192, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        memory.madvise(mmap.MADV_NOHUGEPAGE)
        return torch.frombuffer(memory, dtype=torch.uint8)

    whole = fresh()
    part = whole[123 : 123 + size]  # no page border at either end
    assert sum(1 for _ in populate(part)) >= 4
    populated = faults()
    part.fill_(7)
    assert faults() - populated < 100
    unpopulated = faults()
    fresh().fill_(7)
    assert faults() - unpopulated > 1000
    assert int(whole[122]) == 0 and int(whole[123 + size]) == 0
    assert sum(1 for _ in populate(part)) >= 4 and bool((part == 7).all()), "numbers stay what they are"


def test_a_system_that_does_not_know_how_leaves_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host_memory, "_POPULATE_WRITE", 9999)
    assert list(populate(torch.zeros(100))) == []
    monkeypatch.setattr(host_memory.sys, "platform", "darwin")
    assert list(populate(torch.zeros(100))) == []


def test_zeros() -> None:
    found = zeros((3, 5), torch.bfloat16)
    assert found.shape == (3, 5) and found.dtype is torch.bfloat16 and not found.any()
    assert zeros((0, 5), torch.float32).shape == (0, 5)

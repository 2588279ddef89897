"""Memory that is there before it is written."""

from __future__ import annotations

import mmap
import resource
import sys
import threading

import pytest
import torch

from lowbit.kernels import host_memory
from lowbit.kernels.host_memory import PIECE, WeightRoom, for_weight, populate, zeros


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


def test_weights_of_a_room_lie_one_behind_another() -> None:
    room = WeightRoom()
    alone = for_weight(1000)
    with room.used():
        first, second = for_weight(1000), for_weight(70)
        with WeightRoom().used():
            elsewhere = for_weight(64)
        third, large = for_weight(1), for_weight(1 << 25)
    assert second.data_ptr() == first.data_ptr() + 1024 and third.data_ptr() == second.data_ptr() + 128
    assert first.data_ptr() % 64 == 0 and large.data_ptr() % 64 == 0
    for weight, nbytes in ((alone, 1000), (first, 1000), (second, 70), (third, 1), (large, 1 << 25)):
        assert weight.dtype == torch.uint8 and weight.nbytes == nbytes
        weight.fill_(nbytes % 251)
    assert all(bool((weight == weight.nbytes % 251).all()) for weight in (alone, first, second, third, large))
    room_of = first.untyped_storage().data_ptr()
    assert second.untyped_storage().data_ptr() == room_of
    assert room_of not in {tensor.untyped_storage().data_ptr() for tensor in (alone, elsewhere, large)}
    assert for_weight(8).untyped_storage().data_ptr() != room_of, "the room is left"


def test_a_full_room_is_followed_by_another() -> None:
    with WeightRoom().used():
        taken = [for_weight(10 << 20) for _ in range(4)]
    assert len({tensor.untyped_storage().data_ptr() for tensor in taken}) == 2
    assert len({tensor.data_ptr() for tensor in taken}) == 4


def test_threads_have_rooms_of_their_own() -> None:
    with WeightRoom().used():
        mine = for_weight(64).untyped_storage().data_ptr()
        found: list[int] = []
        other = threading.Thread(target=lambda: found.append(for_weight(64).untyped_storage().data_ptr()))
        other.start()
        other.join()
    assert found != [mine]

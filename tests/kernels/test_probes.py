"""The probes really read and really multiply: their sums say how much."""

from __future__ import annotations

import pytest
import torch

from lowbit.kernels import native, probes

pytestmark = pytest.mark.skipif(native.library() is None, reason="no native library")


@pytest.mark.parametrize("words", [512, 4096 + 640, 100_003])
def test_reading_sums_every_word_of_every_part(words: int) -> None:
    buffer = torch.randint(-(2**62), 2**62, (words,), generator=torch.Generator().manual_seed(words))
    nbytes, total = probes.read(buffer, turns=2)
    each = buffer.nbytes // native.threads() // probes.PIECE * probes.PIECE
    assert nbytes == each * native.threads() <= buffer.nbytes
    assert nbytes > buffer.nbytes - native.threads() * probes.PIECE
    wanted = sum(buffer[: nbytes // 8].tolist())
    assert total == wanted % 2**64


@pytest.mark.parametrize("kind", probes.DOTS)
def test_every_multiply_add_is_in_the_sum(kind: str) -> None:
    rounds = 1000
    done, total = probes.dot(kind, rounds)
    tiles = kind.endswith("tiles")
    if not done:
        assert tiles or (kind == "bf16 dot" and native.base_isa() in ("avx2", "avx512_vnni", "neon"))
        assert total == 0 and probes.dot_peak(kind) == 0
        return
    arm = native.base_isa().startswith("neon")
    lanes = 256 if tiles else 4 if arm else 8 if native.base_isa() == "avx2" else 16
    assert done == total * lanes
    depth = {"fp32 fma": 1, "bf16 dot": 2, "int8 dot": 4, "bf16 tiles": 32, "int8 tiles": 64}[kind]
    accumulators = 4 if tiles else 12 if native.base_isa() == "avx2" else 16
    assert total == native.threads() * accumulators * rounds * depth


def test_bounds_are_numbers_a_machine_can_have() -> None:
    assert 0.1 < probes.read_bandwidth(1 << 20, 0.01) < 1e5
    assert probes.read_bandwidth(1, 0.001) > 0
    assert 1e-4 < probes.dot_peak("fp32 fma", 0.01) < 1e3

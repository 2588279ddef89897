"""Bit packing against a big-integer bit stream, every code in every position."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from lowbit.numerics.bit_packing import pack_bits, pack_words, unpack_bits, unpack_words

AWQ_ORDER = (0, 4, 1, 5, 2, 6, 3, 7)


def stream_words(codes: list[int], bits: int, padded: bool) -> list[int]:
    """32-bit words by the definition, one Python integer at a time."""
    if padded:
        fields = 32 // bits
        rows = [codes[i : i + fields] for i in range(0, len(codes), fields)]
        return [sum(code << bits * k for k, code in enumerate(row)) for row in rows]
    whole = sum(code << bits * k for k, code in enumerate(codes))
    count = -(-len(codes) * bits // 32)
    return [whole >> 32 * i & 0xFFFFFFFF for i in range(count)]


def all_codes(bits: int) -> torch.Tensor:
    """Every code in every position of 96 (three words of any width), and random neighbours."""
    generator = torch.Generator().manual_seed(bits)
    rows = [torch.arange(96).add(start) % (1 << bits) for start in range(1 << bits)]
    rows += [torch.randint(0, 1 << bits, (96,), generator=generator) for _ in range(16)]
    return torch.stack(rows).to(torch.uint8)


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("padded", [False, True])
def test_words_hold_the_bit_stream(bits: int, padded: bool) -> None:
    codes = all_codes(bits)[:, :75]  # no multiple of anything
    words = pack_words(codes, bits, padded=padded)
    for row, packed in zip(codes.tolist(), words.numpy().view(np.uint32).tolist(), strict=True):
        expected = stream_words(row, bits, padded)
        assert packed[: len(expected)] == expected
        assert not any(packed[len(expected) :])
    assert torch.equal(unpack_words(words, bits, 75, padded=padded), codes)


@pytest.mark.parametrize("bits", range(1, 9))
def test_bytes_round_trip(bits: int) -> None:
    codes = all_codes(bits)[:, :91]
    packed = pack_bits(codes, bits)
    assert packed.shape[-1] == -(-91 * bits // 8)
    whole = sum(code << bits * k for k, code in enumerate(codes[3].tolist()))
    assert bytes(packed[3].tolist()) == whole.to_bytes(packed.shape[-1], "little")
    assert torch.equal(unpack_bits(packed, bits, 91), codes)


@pytest.mark.parametrize("dim", [0, 1])
def test_order_and_direction(dim: int) -> None:
    """AWQ: nibble k of a word holds column (0 2 4 6 1 3 5 7)[k]; words along either axis."""
    codes = torch.randint(0, 16, (24, 16), generator=torch.Generator().manual_seed(1)).to(torch.uint8)
    words = pack_words(codes, 4, dim=dim, order=AWQ_ORDER)
    assert words.shape == ((3, 16) if dim == 0 else (24, 2))
    first = codes.movedim(dim, -1)[0, :8].tolist()
    holds = [0, 2, 4, 6, 1, 3, 5, 7]
    expected = sum(first[holds[k]] << 4 * k for k in range(8))
    assert int(words.movedim(dim, -1)[0, 0]) & 0xFFFFFFFF == expected
    assert torch.equal(unpack_words(words, 4, codes.shape[dim], dim=dim, order=AWQ_ORDER), codes)


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 8])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("dim", [0, 1, 2, -2])
def test_words_along_any_axis_of_experts(bits: int, padded: bool, dim: int) -> None:
    codes = torch.randint(0, 1 << bits, (35, 37, 33), generator=torch.Generator().manual_seed(bits))
    codes = codes.to(torch.uint8)
    words = pack_words(codes, bits, dim=dim, padded=padded)
    count = codes.shape[dim]
    assert words.dtype == torch.int32
    line = codes.movedim(dim, -1)[3, 4].tolist()
    packed = words.movedim(dim, -1)[3, 4].numpy().view(np.uint32).tolist()
    assert packed[: len(stream_words(line, bits, padded))] == stream_words(line, bits, padded)
    assert torch.equal(unpack_words(words, bits, count, dim=dim, padded=padded), codes)


@pytest.mark.parametrize("count", [1, 7, 8, 9, 15, 17])
def test_a_last_word_that_is_not_full(count: int) -> None:
    """With an order too: the fields of missing codes are zero, wherever they lie."""
    codes = torch.randint(1, 16, (3, count), generator=torch.Generator().manual_seed(count)).to(torch.uint8)
    words = pack_words(codes, 4, order=AWQ_ORDER)
    assert words.shape == (3, -(-count // 8))
    fields = [[int(w) >> 4 * k & 15 for k in range(8)] for w in words[:, -1].numpy().view(np.uint32)]
    used = (count - 1) % 8 + 1
    for row, line in zip(fields, codes[:, -used:].tolist(), strict=True):
        assert [row[AWQ_ORDER[i]] for i in range(8)] == line + [0] * (8 - used)
    assert torch.equal(unpack_words(words, 4, count, order=AWQ_ORDER), codes)

"""Prompts' tokens, for which kernels may round weights: which rows these are, and what they then give."""

from __future__ import annotations

import threading
from functools import cache

import pytest
import torch
from torch import Tensor

from benchmark_modules import benchmark_module
from lowbit.kernels import choose, native
from lowbit.kernels.prompt_rows import as_stored, first_prompt_row, prompt_rows, rounding
from lowbit.kernels.settled import settled
from lowbit.layers.linear import Linear

COLUMNS, TOKENS = 1024, 77
FORMATS = benchmark_module("linear_formats")
# Of the products' size: two roundings of 2^-9 each, spread as in a random walk, or of a 4,094th of the
# largest of 128 numbers.
LEAST_OFF, MOST_OFF = 2e-4, 4e-3
# All their numbers are bfloat16's, or sums go on to the end of a row: with AVX-512 in another order.
REORDERED = 1e-6 if native.base_isa() == "avx512" else 0.0
# Without products of bfloat16 prompts meet whole numbers, which these are not either.
WHOLE = native.base_isa() in ("avx2", "avx512_vnni")
EXACT = set() if WHOLE else {"bf16", "f16", "int8 channel", "fp8 channel", "mxfp4"}
# Inputs are whole numbers, or codes that are bfloat16's, and each row of weights has one scale.
OWN_INPUTS = {"w8a8"} if WHOLE else {"w8a8", "fp8 row x row"}


def test_rows_before_the_first_are_none() -> None:
    assert first_prompt_row(5) == 5
    with prompt_rows(2, 5):
        assert first_prompt_row(5) == 2
        with as_stored():
            assert first_prompt_row(3) == 3
        assert first_prompt_row(5) == 2
        with pytest.raises(AssertionError, match="as_stored"):
            first_prompt_row(4)
        seen: list[int] = []
        other = threading.Thread(target=lambda: seen.append(first_prompt_row(5)))
        other.start()
        other.join()
        assert seen == [5], "a step's rows are its thread's"
    with pytest.raises(ValueError, match="lost"), prompt_rows(0, 5):
        raise ValueError("lost")
    assert first_prompt_row(5) == 5


@cache
def layer(name: str) -> Linear:
    rows = 288 if name.startswith("vptq") else 272  # 17 blocks, or 18
    rows = 256 if name.startswith(("exl3", "quip")) else rows
    sample = FORMATS.FORMATS[name](FORMATS.matrix((rows, COLUMNS)))
    kernel = choose(sample.weight.scheme, sample.weight.shape, torch.device("cpu")).kernel
    return Linear(name, [kernel.pack(sample.weight, torch.device("cpu"))], None, [sample.transform])


def inputs() -> Tensor:
    return torch.randn(TOKENS, COLUMNS, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("name", FORMATS.FORMATS)
def test_a_row_has_its_bits_in_any_company(name: str) -> None:
    """A prompt's row alone and among others, beside rows that are none, with one thread and with two."""
    linear, x = layer(name), inputs()
    stored = linear(x)
    with prompt_rows(0, TOKENS):
        rounded = linear(x)
    off = float((rounded - stored).norm() / stored.norm())
    changes = rounding("cpu") and name not in EXACT | OWN_INPUTS
    assert (LEAST_OFF < off < MOST_OFF) if changes else off <= REORDERED, off
    before = native.threads() if native.library() is not None else 1
    try:
        for threads in (1, 2):
            if native.library() is not None:
                native.set_threads(threads)
            for count in (1, 2, 15, 16, 17, 33, 63, 64):
                with prompt_rows(0, count):
                    assert torch.equal(linear(x[:count]), rounded[:count]), (threads, count)
            for first in (1, 20, TOKENS - 1):
                with prompt_rows(first, TOKENS):
                    mixed = linear(x)
                assert torch.equal(mixed[:first], stored[:first]), (threads, first)
                assert torch.equal(mixed[first:], rounded[first:]), (threads, first)
    finally:
        if native.library() is not None:
            native.set_threads(before)


@pytest.mark.skipif(not rounding("cpu"), reason="no kernel rounds here")
@pytest.mark.parametrize("columns", [32, 96, 160, 576])  # whole numbers have a scale for each 128
@pytest.mark.parametrize("name", ["int4 g32", "bf16", "nf4"])
def test_prompts_of_columns_that_end_within_a_scale(name: str, columns: int) -> None:
    """An odd number of blocks, the last of which is not whole; each row in any company."""
    sample = FORMATS.FORMATS[name](FORMATS.matrix((278, columns)))
    kernel = choose(sample.weight.scheme, sample.weight.shape, torch.device("cpu")).kernel
    linear = Linear(name, [kernel.pack(sample.weight, torch.device("cpu"))], None, [sample.transform])
    x = torch.randn(70, columns, generator=torch.Generator().manual_seed(7))
    with prompt_rows(0, 70):
        found = linear(x)
    wanted = x @ sample.weight.dequantize().float().T
    assert (found - wanted).norm() < MOST_OFF * wanted.norm()
    for count in (1, 15, 33):
        with prompt_rows(0, count):
            assert torch.equal(linear(x[:count]), found[:count]), count


@pytest.mark.skipif(not rounding("cpu"), reason="no kernel rounds here")
@pytest.mark.parametrize("rows", [1, 2, 27])  # of vectors
@pytest.mark.parametrize("length", [3, 5, 6, 7, 9, 12])
def test_prompts_meet_16_rows_of_blocks_that_have_fewer(length: int, rows: int) -> None:
    """Vectors of 12 rows and others that fill no block: each row is its own."""
    weight = FORMATS.row_codebook_weight((rows * length, 160), length, 256)
    kernel = choose(weight.scheme, weight.shape, torch.device("cpu")).kernel
    linear = Linear("rows", [kernel.pack(weight, torch.device("cpu"))], None, [None])
    x = torch.randn(70, 160, generator=torch.Generator().manual_seed(8))
    stored = linear(x)
    with prompt_rows(0, 70):
        found = linear(x)
    with prompt_rows(0, 5):
        assert torch.equal(linear(x[:5]), found[:5])
    assert ((found - stored).norm(dim=0) < MOST_OFF * stored.norm(dim=0)).all()


@pytest.mark.skipif(native.library() is None, reason="torch's rows depend on their number")
@pytest.mark.parametrize("columns", [96, 1024, 1056])  # 3, 32 and 33 tiles
@pytest.mark.parametrize("name", ["w8a8", "fp8 row x row", "int4 g32", "nf4"])
def test_generated_rows_have_their_bits_beside_few_and_many(name: str, columns: int) -> None:
    """Of inputs that are quantized too: from 16 tokens and from 64 on other routines run."""
    sample = FORMATS.FORMATS[name](FORMATS.matrix((272, columns)))
    kernel = choose(sample.weight.scheme, sample.weight.shape, torch.device("cpu")).kernel
    weight = kernel.pack(sample.weight, torch.device("cpu"))
    linear = Linear(name, [weight], None, [settled(weight, sample.transform)])
    x = torch.randn(150, columns, generator=torch.Generator().manual_seed(5))
    x[70, 3] = float("nan")
    whole = linear(x)
    assert whole[70].isnan().all() and whole[[69, 71]].isfinite().all()
    for count in (1, 2, 15, 16, 17, 33, 63, 64, 65):
        assert torch.equal(linear(x[:count]), whole[:count]), count


@pytest.mark.skipif(native.library() is None, reason="torch's rows depend on their number")
@pytest.mark.parametrize("rows", [288, 282])  # the last block whole, and not
@pytest.mark.parametrize("name", ["w8a8", "int4 g32", "int8 channel", "fp8 channel", "bf16", "q4_k"])
def test_more_than_512_tokens_and_more_columns_than_a_cache_holds(name: str, rows: int) -> None:
    """Sums that wait for the next columns, and the last tokens by themselves; biases, and gates."""
    columns, tokens = 2816, 530
    sample = FORMATS.FORMATS[name](FORMATS.matrix((rows, columns)))
    kernel = choose(sample.weight.scheme, sample.weight.shape, torch.device("cpu")).kernel
    weight = kernel.pack(sample.weight, torch.device("cpu"))
    transforms = [settled(weight, sample.transform)]
    linear = Linear(name, [weight], None, transforms)
    x = torch.randn(tokens, columns, generator=torch.Generator().manual_seed(6))
    with prompt_rows(0, tokens):
        whole = linear(x)
    for first, count in ((0, 1), (0, 33), (0, 512), (0, 513), (512, 18), (529, 1)):
        with prompt_rows(0, count):
            assert torch.equal(linear(x[first : first + count]), whole[first : first + count]), (first, count)
    bias = torch.arange(float(rows))
    with prompt_rows(0, tokens):
        assert torch.equal(Linear(name, [weight], bias, transforms)(x), whole + bias)
        if rows % 32 == 0:
            gate, up = whole.chunk(2, dim=1)
            expected = torch.nn.functional.silu(gate) * up
            assert torch.allclose(linear.gated(x, "silu"), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["int4 g32", "q4_1", "q6_k", "nf4", "vptq v12 k65536", "exl3 3 bits"])
def test_a_gate_is_that_of_its_rows(name: str) -> None:
    linear, x = layer(name), inputs()
    with prompt_rows(9, TOKENS):
        both, gated = linear(x), linear.gated(x, "silu")
    gate, up = both.chunk(2, dim=1)
    assert torch.allclose(gated, torch.nn.functional.silu(gate) * up, rtol=1e-5, atol=1e-6)


def in_whole_numbers(matrix: Tensor, largest: int, *, doublings: bool) -> Tensor:
    """float64: rows as whole numbers up to ``largest``, 128 columns under a scale (a power of two)."""
    groups = matrix.float().unflatten(1, (-1, 128))
    scale = groups.abs().amax(-1, keepdim=True) / largest
    if doublings:
        scale = scale.log2().ceil().exp2()
    return ((groups / scale).round().double() * scale.double()).flatten(1)


@pytest.mark.skipif(not rounding("cpu"), reason="no kernel rounds here")
@pytest.mark.parametrize(
    ("name", "most"),
    [
        *((name, 2e-5) for name in ("int4 g32", "awq g128", "q4_1", "q4_k", "int3 g64", "fp8 block")),
        ("nf4", 5e-4),
    ],
)
def test_weights_are_rounded_to_the_nearest(name: str, most: float) -> None:
    """A last bit of float32 turns the rounding of a few, of whole numbers that of ties, which are many.

    nf4's values are whole numbers of 13 bits before.
    """
    linear, x = layer(name), inputs()
    [weight] = linear.weights
    rows = weight.kernel.rows(weight, torch.arange(weight.shape[0], dtype=torch.int32))
    with prompt_rows(0, TOKENS):
        found = linear(x)
    if WHOLE:
        rows = in_whole_numbers(rows, 2047, doublings=False)
        seen = in_whole_numbers(x, 8191, doublings=True)
        most = max(most, 1e-4)
    else:
        rows, seen = rows.bfloat16().double(), x.bfloat16().double()
    error = (found - seen @ rows.T).abs() / (seen.abs() @ rows.abs().T)
    assert error.max() < most, error.max()


def test_results_that_are_no_numbers_go_through() -> None:
    linear, x = layer("int4 g32"), inputs()
    x[3, 5], x[40, 7] = float("nan"), float("inf")
    with prompt_rows(0, TOKENS):
        found = linear(x)
    assert found[3].isnan().all() and not found[40].isfinite().any()
    assert found[[0, 2, 4, 39, 41, 76]].isfinite().all()

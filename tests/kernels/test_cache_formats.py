"""Cache formats: what is stored of K and V against numpy, and native attention over every pair of formats."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from attention_helpers import (
    CPU,
    E4M3,
    FLOAT_PRODUCTS,
    Sequence,
    Step,
    assert_equal_bits,
    draw,
    expected,
    hand_out_pages,
    key_codes,
    latent_of,
    make_batch,
    plain,
    simulate,
    spec_of,
    whole,
)
from lowbit.kernels import native
from lowbit.kernels.attention import PAGE_SIZE, CacheSpec, LayerCache, choose_attention
from lowbit.kernels.attention_cpu import CpuAttention
from lowbit.kernels.attention_reference import ReferenceAttention
from lowbit.numerics.cache_format import K_FORMATS, V_FORMATS, KvDtype
from oracles import kv_cache as oracle

pytestmark = pytest.mark.usefixtures("poisoned")
NAMES = tuple(K_FORMATS)
NARROW = ("fp8_e4m3", "fp8_e5m2", "int8", "int4")
PAIRS = list(itertools.product(NAMES, NAMES))
HEAD_SIZES = (64, 80, 96, 128, 256)
needs_native = pytest.mark.skipif(native.library() is None, reason="the native library was not built")


def cruel(dim: int, heads: int = 2) -> Tensor:
    """(tokens, heads, dim): every token and head of a size of its own, and what is hard to round."""
    numbers = torch.randn(9, heads, dim, generator=torch.Generator().manual_seed(dim))
    numbers *= torch.logspace(-3, 3, 9 * heads).view(
        9, heads, 1
    )  # the next token is hundreds of times larger
    numbers[1, 0] = 0
    numbers[2, 0] = 1.2345678  # a constant that is no bfloat16 number
    numbers[3, 0] = -numbers[3, 0].abs()
    numbers[4, 1] *= 1e-41  # no normal float32 number
    numbers[5, 1] *= 1e32
    numbers[6, 0, :] = torch.arange(dim) % 31 / 2  # ties: 15 is the largest number
    numbers[6, 1, :] = torch.arange(dim) % 255 - 127.0
    numbers[7, 0, 3] = 1e4  # one channel above all
    numbers[8, 0] += 100  # far from zero
    return numbers


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dim", [6, 64, 80, 128, 250])
def test_what_is_read_back(name: str, dim: int) -> None:
    for part, formats in (("k", K_FORMATS), ("v", V_FORMATS)):
        numbers = cruel(dim) if name != "fp16" else cruel(dim).clamp(-65504, 65504)
        stored = formats[name].encode(numbers)
        found = formats[name].decode(stored, dim).numpy()
        wanted = oracle.read_back(numbers.numpy(), name, part)
        np.testing.assert_array_equal(found, wanted)
        assert sum(tensor.nbytes for tensor in stored if tensor is not None) == numbers.shape[
            0
        ] * numbers.shape[1] * formats[name].token_bytes(dim)


@pytest.mark.parametrize("name", NARROW)
def test_every_token_and_head_has_its_own_scale(name: str) -> None:
    """The relative error of a vector does not depend on how large its neighbours are."""
    numbers = cruel(128)
    steps = {"fp8_e4m3": 2**-4, "fp8_e5m2": 2**-3, "int8": 0.8 / 127, "int4": 1.1 / 15}[name]
    found = K_FORMATS[name].decode(K_FORMATS[name].encode(numbers), 128)
    largest = numbers.abs().amax(-1)
    error = (found - numbers).abs().amax(-1)
    normal = largest > 1e-30
    assert (error <= steps * largest)[normal].all()
    assert (found[1, 0] == 0).all()


@pytest.mark.parametrize("name", NARROW)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_no_number_is_contained_in_its_group(name: str, bad: float) -> None:
    numbers = cruel(64)
    numbers[3, 1, 17] = bad
    stored = K_FORMATS[name]
    found = stored.decode(stored.encode(numbers), 64)
    group = slice(16, 32) if name == "int4" else slice(0, 64)
    assert found[3, 1, group].isnan().all()
    found[3, 1, group] = 0
    assert found.isfinite().all()


def native_keys(cache: LayerCache, tokens: int) -> tuple[np.ndarray, np.ndarray]:
    """Codes (tokens, heads, dim) and scales (tokens, heads, groups, parameters) of K's quantized pages."""
    spec, stored = cache.spec, cache.spec.k_format
    pages = cache.buffers["k"].numpy()
    codes = key_codes(cache.buffers["k"], spec.k_dim, stored.bits).numpy()
    if stored.name == "int8":  # sign and magnitude
        codes = np.where(codes > 127, 128 - codes.astype(np.int16), codes).astype(np.uint8)
    scales = np.ascontiguousarray(pages[:, :, spec.k_dim * PAGE_SIZE * stored.bits // 8 :]).view(np.uint16)
    scales = scales.reshape(*pages.shape[:2], -1, stored.parameters, PAGE_SIZE).transpose(0, 4, 1, 2, 3)
    return codes[:tokens], scales.reshape(-1, *scales.shape[2:])[:tokens]


@needs_native
@pytest.mark.parametrize("name", NARROW)
@pytest.mark.parametrize("dim", [64, 80, 256])
def test_native_pages_hold_the_same_codes(name: str, dim: int) -> None:
    numbers = cruel(dim).repeat(3, 1, 1)
    numbers[5, 0, 9] = torch.nan
    numbers[11, 1, 2] = torch.inf
    tokens = len(numbers)
    spec = spec_of(2, dim, dtype=KvDtype.of(name))
    kernel = CpuAttention()
    cache = kernel.allocate(spec, 2, PAGE_SIZE, CPU)
    kernel.write(cache, numbers, numbers, make_batch([(0, 0, tokens)], [[0, 1]]))
    codes, scales = native_keys(cache, tokens)
    wanted = K_FORMATS[name].encode(numbers)
    wanted_codes = wanted.codes.view(torch.uint8).numpy()
    if name == "int4":
        wanted_codes = np.stack([wanted_codes & 15, wanted_codes >> 4], -1).reshape(tokens, 2, dim)
    finite = torch.ones(tokens, 2, dtype=torch.bool)
    finite[5, 0] = finite[11, 1] = False  # codes without a scale mean nothing
    assert wanted.scales is not None
    np.testing.assert_array_equal(codes[finite], wanted_codes[finite])
    theirs = wanted.scales.float().numpy()
    mine = (scales.astype(np.uint32) << 16).view(np.float32)
    np.testing.assert_array_equal(mine[..., 0], theirs[..., 0])
    np.testing.assert_array_equal(mine[finite], theirs[finite])


@needs_native
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dim", HEAD_SIZES)
def test_values_come_back_exactly(name: str, dim: int) -> None:
    """A window of one token returns that token's value, on every path of the native code."""
    numbers = cruel(dim).clamp(-6e4, 6e4).repeat(3, 1, 1)
    tokens = len(numbers)
    spec = spec_of(2, dim, dtype=KvDtype.of("bf16", name), window=1)
    sequences = [(torch.ones(tokens, 2, dim), torch.ones(tokens, 2, dim), numbers)]
    wanted = oracle.read_back(numbers.numpy(), name, "v")
    for steps in (whole(sequences), [[(0, at, at + 1)] for at in range(tokens)]):
        (found,) = simulate(spec, sequences, steps, plain(spec))
        # vdpbf16ps takes subnormal numbers for zeros
        np.testing.assert_allclose(found.view(tokens, 2, dim).numpy(), wanted, rtol=0, atol=2e-38)


def uneven(spec: CacheSpec, group: int, lengths: list[int]) -> list[Sequence]:
    """Random sequences in which every token and head has sizes of its own, and some values stand out."""
    sizes = torch.Generator().manual_seed(9)
    made = []
    for q, k, v in draw(spec, group, lengths):
        k = k * torch.rand(*k.shape[:2], 1, generator=sizes)
        k[..., 5] *= 6
        v = v * torch.rand(*v.shape[:2], 1, generator=sizes) ** 4
        v[len(v) // 2] *= 1000
        made.append((q, k, v))
    return made


@needs_native
@pytest.mark.parametrize("number", range(len(PAIRS)), ids=lambda number: " ".join(PAIRS[number]))
def test_every_pair_of_formats(number: int) -> None:
    """Native and reference attention against float64 over K and V as numpy stores them."""
    dtype = KvDtype.of(*PAIRS[number])
    dim, window = HEAD_SIZES[number % 5], (0, 19)[number // 2 % 2]
    spec = spec_of(2, dim, dtype=dtype, window=window)
    assert choose_attention(spec, CPU).name == "cpu"
    extra = {"softcap": 5.0, "sinks": torch.linspace(-2, 3, 4)} if number % 3 == 0 else {}
    parameters = replace(plain(spec), **extra)
    sequences = uneven(spec, 2, [1, 33, 270])
    steps: list[Step] = [[(1, 0, 20), (2, 0, 129)], [(0, 0, 1), (2, 129, 270), (1, 20, 33)]]
    as_is = V_FORMATS[dtype.v.name].name in ("f32", "fp16")
    for kernel in (CpuAttention(), ReferenceAttention()):
        outputs = simulate(spec, sequences, steps, parameters, kernel)
        for (q, k, v), found in zip(sequences, outputs, strict=True):
            wanted = expected(spec, (q, k, v), parameters)
            weighed = expected(spec, (q, k, v), parameters, magnitudes=True)
            if kernel.name == "reference" or native.base_isa() in FLOAT_PRODUCTS or as_is:
                assert ((found - wanted).abs() <= 2e-5 * weighed + 1e-6 * weighed.mean()).all()
            else:  # softmax weights are rounded to bfloat16
                assert ((found - wanted).abs() <= 2**-7 * weighed + 1e-6 * weighed.mean()).all()


@needs_native
@pytest.mark.parametrize("name", NARROW)
def test_no_number_reaches_another_sequence_or_an_earlier_token(name: str) -> None:
    spec = spec_of(2, 64, dtype=KvDtype.of(name))
    (q, k, v), mate = draw(spec, 2, [300, 40])
    clean = simulate(spec, [(q, k, v), mate], whole([(q, k, v), mate]), plain(spec))
    for part in (0, 1):
        both = [k.clone(), v.clone()]
        both[part][283, 1] = torch.nan
        sequence = (q, *both)
        found = simulate(spec, [sequence, mate], whole([sequence, mate]), plain(spec))
        assert_equal_bits([found[0][:283], found[1]], [clean[0][:283], clean[1]])
        first, second = found[0][283:].split(2 * 64, dim=1)
        assert second.isnan().all() and first.equal(clean[0][283:, : 2 * 64]), "only its own head"


@needs_native
@pytest.mark.parametrize("name", ["int8", "int4"])
def test_shared_prefix_pages(name: str) -> None:
    spec, shared = spec_of(2, 64, dtype=KvDtype.of(name)), 20 * PAGE_SIZE
    first, second = draw(spec, 3, [400, 470])
    q, k, v = (torch.cat([a[:shared], b[shared:]]) for a, b in zip(first, second, strict=True))
    second = (q, k, v)
    apart = simulate(spec, [first, second], whole([first, second]), plain(spec))
    (mine, other), _ = hand_out_pages([400, 470])
    pages = [mine, mine[: shared // PAGE_SIZE] + other[shared // PAGE_SIZE :]]
    steps: list[Step] = [[(0, 0, 400)], [(1, shared, 470)]]
    found = simulate(spec, [first, second], steps, plain(spec), pages=pages)
    assert_equal_bits([found[0], found[1][shared:]], [apart[0], apart[1][shared:]])


BYTES = {  # of one token with two heads of 128
    "f32": (spec_of(2, 128, dtype=KvDtype.of("f32")), 2 * 2 * 128 * 4),
    "fp16": (spec_of(2, 128, dtype=KvDtype.of("fp16")), 2 * 2 * 128 * 2),
    "static e4m3": (spec_of(2, 128, dtype=E4M3), 2 * 2 * 128),
    "int8": (spec_of(2, 128, dtype=KvDtype.of("int8")), 2 * 2 * (128 + 2)),
    "int4": (spec_of(2, 128, dtype=KvDtype.of("int4")), 2 * ((64 + 8 * 4) + (64 + 2 * 4))),
    "int4, 80": (spec_of(2, 80, dtype=KvDtype.of("int4")), 2 * ((40 + 5 * 4) + (40 + 2 * 4))),
    "int8 and bf16": (spec_of(2, 128, dtype=KvDtype.of("int8", "bf16")), 2 * (128 + 2 + 256)),
    "latent int8": (latent_of(576, 512, KvDtype.of("int8")), 576 + 9 * 2),
}


@pytest.mark.parametrize("case", BYTES)
def test_bytes_are_counted(case: str) -> None:
    spec, wanted = BYTES[case]
    assert spec.token_bytes() == wanted
    kernels = [ReferenceAttention(), *([CpuAttention()] if native.library() else [])]
    for kernel in kernels:
        buffers = kernel.allocate(spec, 3, PAGE_SIZE, CPU).buffers
        assert sum(buffer.nbytes for buffer in buffers.values()) == 3 * PAGE_SIZE * wanted


@needs_native
def test_odd_groups_run_on_the_reference() -> None:
    """A latent of 32 + 8 numbers has a scale for every 8 of them: no whole vector of the native code."""
    spec = latent_of(48, 40, KvDtype.of("int8"))
    assert choose_attention(spec, CPU).name == "reference"
    sequences = draw(spec, 2, [30])
    (found,) = simulate(spec, sequences, whole(sequences), plain(spec), ReferenceAttention())
    wanted = expected(spec, sequences[0], plain(spec))
    assert (found - wanted).abs().max() <= 4e-6 * wanted.abs().max()

"""Triton's paged attention: pages as the definition stores them, results against float64 and reference."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from attention_helpers import (
    BF16,
    CPU,
    E4M3,
    F16,
    F32,
    NOWHERE,
    Sequence,
    Step,
    draw,
    expected,
    hand_out_pages,
    latent_of,
    make_batch,
    plain,
    simulate,
    spec_of,
    whole,
)
from forward_helpers import chunk_batch
from lowbit.checkpoint import open_checkpoint
from lowbit.errors import LowbitError
from lowbit.kernels.attention import (
    AttentionKernel,
    AttentionParameters,
    CacheSpec,
    LayerCache,
    choose_attention,
)
from lowbit.kernels.attention_reference import ReferenceAttention
from lowbit.kernels.gpu import attention, runtime
from lowbit.kernels.gpu.attention import GpuAttention
from lowbit.loading import load_model
from lowbit.numerics.cache_format import KvDtype
from models.family_cases import SIZES, saved
from models.test_deepseek import make_checkpoint
from sparse_memory import far_apart, sparse_zeros

INT8, INT4, DYNAMIC, E5M2 = (KvDtype.of(name) for name in ("int8", "int4", "fp8_e4m3", "fp8_e5m2"))
GPT_OSS = {"sinks": torch.tensor([1.5, -3.0, 60.0, 0.0]), "softcap": 3.0}


def cruel(dim: int, heads: int = 2) -> Tensor:
    """(tokens, heads, dim): every token and head of a size of its own, and what is hard to round."""
    numbers = torch.randn(11, heads, dim, generator=torch.Generator().manual_seed(dim))
    numbers *= torch.logspace(-3, 3, 11 * heads).view(11, heads, 1)
    numbers[1, 0] = 0
    numbers[2, 0] = 1.2345678
    numbers[3, 0] = -numbers[3, 0].abs()
    numbers[4, 1] *= 1e-41  # no normal float32 number
    numbers[5, 1] *= 1e32
    numbers[6, 0, :] = torch.arange(dim) % 31 / 2  # ties
    numbers[6, 1, :] = torch.arange(dim) % 255 - 127.0
    numbers[7, 0, 3] = 1e4
    numbers[8, 0] += 100
    numbers[9, 1, 5] = torch.nan
    numbers[10, 0, 2] = -torch.inf
    return numbers


def bits(x: Tensor) -> Tensor:
    """What two tensors must share; every NaN is one."""
    x = torch.where(x == 0, torch.zeros_like(x), x) if x.dtype is torch.bfloat16 else x
    whole_numbers = {1: torch.uint8, 2: torch.int16, 4: torch.int32}[x.dtype.itemsize]
    return torch.where(x != x, -1, x.view(whole_numbers)) if x.is_floating_point() else x.view(whole_numbers)


WRITTEN = {
    **{name: spec_of(2, 80, 96, KvDtype.of(name)) for name in ("f32", "bf16", "fp16", "int8", "int4")},
    "fp8_e4m3": spec_of(2, 250, 64, DYNAMIC),
    "fp8_e5m2": spec_of(2, 64, 6, E5M2),
    "static": spec_of(2, 64, 80, E4M3),
    "K int8, V int4": spec_of(2, 64, 80, KvDtype.of("int8", "int4")),
    "latent": replace(latent_of(112, 80), heads=2),
    "latent int8": replace(latent_of(96, 48, INT8), heads=2),
    "latent int4": replace(latent_of(112, 80, INT4), heads=2),
}


@pytest.mark.parametrize("case", WRITTEN)
def test_pages_hold_the_codes_and_scales_of_the_definition(case: str, device: torch.device) -> None:
    spec, page_size = WRITTEN[case], 8
    k, v = cruel(spec.k_dim), cruel(spec.v_dim).flip(0)
    slots = torch.tensor([5, 17, -1, 3, 31, 30, 8, 9, 1 << 20, 0, 22], dtype=torch.int32)
    batch = make_batch([(0, 0, 11)], [[3, 0]], page_size, device)
    batch.write_slots = slots.to(device)
    cache = GpuAttention().allocate(spec, 4, page_size, device)
    before = {name: buffer.clone().fill_(1) for name, buffer in cache.buffers.items()}
    for name, buffer in cache.buffers.items():
        buffer.copy_(before[name])
    fused = torch.cat([k, v], 2).to(device)  # views of one output
    GpuAttention().write(cache, fused[..., : spec.k_dim], fused[..., spec.k_dim :], batch)
    inside = [row for row, slot in enumerate(slots.tolist()) if 0 <= slot < 4 * page_size]
    for name, numbers, form in (("k", k, spec.k_format), ("v", v, spec.v_format)):
        if name == "v" and spec.kind == "latent":
            continue
        wanted = form.encode(numbers)
        for part, rows in ((name, wanted.codes), (f"{name}_scales", wanted.scales)):
            if rows is None:
                continue
            found = cache.buffers[part].cpu().transpose(1, 2).flatten(0, 1)  # (slots, heads, ...)
            at = slots[inside].long()
            if part.endswith("scales"):
                finite = ~rows[..., :1].isnan().expand_as(rows)
                finite[..., 0] = True  # a lowest value beside a scale that is NaN means nothing
                assert torch.equal(bits(found[at])[finite[inside]], bits(rows[inside])[finite[inside]])
            else:
                assert torch.equal(bits(found[at].view(rows.dtype)), bits(rows[inside]))
            rest = torch.ones(len(found), dtype=torch.bool)
            rest[at] = False
            kept = before[part].cpu().transpose(1, 2).flatten(0, 1)
            assert torch.equal(found[rest], kept[rest]), "slots that nobody writes"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_short_floats_are_written_from_short_floats(dtype: torch.dtype, device: torch.device) -> None:
    spec = spec_of(1, 64, dtype=KvDtype.of("int8", "bf16"))
    k = torch.randn(20, 1, 64, generator=torch.Generator().manual_seed(3)).to(dtype)
    cache = GpuAttention().allocate(spec, 2, 16, device)
    batch = make_batch([(0, 0, 20)], [[0, 1]], device=device)
    GpuAttention().write(cache, k.to(device), k.to(device), batch)
    codes, scales = spec.k_format.encode(k)
    assert torch.equal(cache.buffers["k"].cpu().flatten(0, 2)[:20], codes[:, 0])
    assert scales is not None and torch.equal(
        cache.buffers["k_scales"].cpu().flatten(0, 2)[:20], scales[:, 0]
    )
    assert torch.equal(cache.buffers["v"].cpu().flatten(0, 2)[:20], k[:, 0].bfloat16())


def test_every_e4m3_code_is_read_and_written(device: torch.device) -> None:
    """All bfloat16 numbers, ties among them, as torch rounds them; every code as the value of a token."""
    numbers = torch.arange(65536).to(torch.int32).to(torch.int16).view(torch.bfloat16).float()
    k = numbers.view(256, 1, 256)
    spec, kernel = spec_of(1, 256, dtype=E4M3, window=1), GpuAttention()
    cache = kernel.allocate(spec, 16, 16, device)
    batch = make_batch([(0, 0, 256)], [list(range(16))], device=device)
    kernel.write(cache, k.to(device), k.to(device), batch)
    wanted = k[:, 0].clamp(-448, 448).to(torch.float8_e4m3fn)
    found = cache.buffers["k"].cpu().flatten(0, 2)
    assert torch.equal(bits(found.view(torch.float8_e4m3fn).float()), bits(wanted.float()))
    codes = torch.arange(256, dtype=torch.uint8)
    codes[[0x7F, 0xFF]] = 0  # NaN times a weight of 0 is NaN
    cache.buffers["k"].zero_()
    cache.buffers["v"].view(256, 256).copy_(codes.expand(256, 256))
    batch = make_batch([(0, 255, 256)], [list(range(16))], device=device)
    out = kernel.attend(torch.zeros(1, 1, 256, device=device), cache, batch, plain(spec))
    assert torch.equal(out[0].cpu(), codes.view(torch.float8_e4m3fn).float())


CASES: dict[str, tuple[CacheSpec, int, dict[str, Any]]] = {
    "bf16, groups of 3": (spec_of(2, 64), 3, {}),
    "f32, 80": (spec_of(1, 80, dtype=F32), 1, {}),
    "f32, 33 and 24, 5 queries a key": (spec_of(1, 33, 24, F32), 5, {}),
    "f32, window, sinks, softcap": (spec_of(1, 16, dtype=F32, window=19), 4, GPT_OSS),
    "bf16, window of one": (spec_of(1, 32, window=1), 2, {}),
    "fp16, k 192, v 128": (spec_of(1, 192, 128, F16), 1, {}),
    "static e4m3, 96": (spec_of(1, 96, dtype=E4M3), 2, {}),
    "e4m3 of each token": (spec_of(1, 64, dtype=DYNAMIC), 1, {}),
    "e5m2, softcap": (spec_of(1, 80, dtype=E5M2), 2, {"softcap": 3.0}),
    "int8": (spec_of(1, 64, dtype=INT8), 2, {}),
    "int4": (spec_of(1, 128, dtype=INT4), 4, {}),
    "int4, 80, short groups": (spec_of(1, 80, dtype=INT4), 1, {}),
    "K int8, V int4": (spec_of(1, 96, 128, KvDtype.of("int8", "int4")), 2, {}),
    "K f32, V e4m3, sinks": (spec_of(1, 32, dtype=KvDtype.of("f32", "fp8_e4m3")), 4, GPT_OSS),
    "latent": (latent_of(576, 512), 2, {}),
    "latent f32": (latent_of(48, 32, F32), 5, {}),
    "latent with values of no power of two": (latent_of(112, 80), 3, {}),
    "latent int8": (latent_of(576, 512, INT8), 2, {}),
    "latent int8, groups of 48": (latent_of(96, 48, INT8), 2, {}),
    "latent int4": (latent_of(112, 80, INT4), 2, {}),
    "latent e4m3 that is all value": (latent_of(16, 16, DYNAMIC), 2, {}),
}
# A prompt, its rest beside sequences of few queries (two launches), and a decode.
LENGTHS = [1, 10, 40]
STEPS: list[Step] = [
    [(2, 0, 20)],
    [(0, 0, 1), (1, 0, 9), (2, 20, 39)],
    [(2, 39, 40), (1, 9, 10)],
]
SELDOM = (
    "bf16, window of one",
    "e4m3 of each token",
    "latent int4",
    "fp16, k 192, v 128",
    "e5m2, softcap",
    "int4",
    "K f32, V e4m3, sinks",
    "latent int8, groups of 48",
)


def tolerance(spec: CacheSpec, sequence: Sequence, found: Tensor, parameters: Any) -> Tensor:
    """What rounding costs: of softmax weights, and of numbers that scales of groups make."""
    if spec.v_format.name == "f32" == spec.k_format.name:
        return 2e-6 * expected(spec, sequence, parameters).abs().max().expand_as(found)
    weighed = expected(spec, sequence, parameters, True)
    grouped = any(form.group_of(dim) not in (0, dim) for form, dim in parts(spec))
    return (2**-6 if grouped else 2**-8) * weighed + 1e-6 * weighed.mean()


def parts(spec: CacheSpec) -> list[tuple[Any, int]]:
    return [(spec.k_format, spec.k_dim), (spec.v_format, spec.v_dim)]


def assert_close(spec: CacheSpec, sequences: list[Sequence], outputs: list[Tensor], parameters: Any) -> None:
    for sequence, found in zip(sequences, outputs, strict=True):
        wanted = expected(spec, sequence, parameters)
        assert ((found - wanted).abs() <= tolerance(spec, sequence, found, parameters)).all()


@pytest.mark.parametrize(
    "case", [pytest.param(case, marks=pytest.mark.slow) if case in SELDOM else case for case in CASES]
)
def test_equals_float64(case: str, device: torch.device) -> None:
    spec, group, extra = CASES[case]
    if "sinks" in extra:
        extra = extra | {"sinks": extra["sinks"][: spec.heads * group]}
    parameters = replace(plain(spec), **extra)
    sequences = draw(spec, group, LENGTHS)
    outputs = simulate(spec, sequences, STEPS, parameters, GpuAttention(), device=device)
    assert_close(spec, sequences, outputs, parameters)


@pytest.mark.parametrize("group", [1, 2, 4])
@pytest.mark.parametrize("lengths", [[32] * 4, [64] * 4, [17] * 3, [20] * 6, [24, 24, 24, 20, 24]], ids=str)
def test_prompts_of_nearly_one_length(lengths: list[int], group: int, device: torch.device) -> None:
    """Their tiles are numbered with gaps: no fewer programs than the last one's number."""
    spec = spec_of(1, 16, dtype=F32)
    sequences = draw(spec, group, lengths)
    step: Step = [(number, 0, length) for number, length in enumerate(lengths)]
    outputs = simulate(spec, sequences, [step], plain(spec), GpuAttention(), device=device)
    assert_close(spec, sequences, outputs, plain(spec))


@pytest.mark.parametrize("page_size", [8, 64])
def test_other_page_sizes(page_size: int, device: torch.device) -> None:
    spec = spec_of(1, 16, dtype=F32, window=40)
    sequences = draw(spec, 2, [9, 50])
    steps: list[Step] = [[(1, 0, 49)], [(0, 0, 9), (1, 49, 50)]]
    outputs = simulate(
        spec, sequences, steps, plain(spec), GpuAttention(), page_size=page_size, device=device
    )
    assert_close(spec, sequences, outputs, plain(spec))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_short_floats_in_and_out(dtype: torch.dtype, device: torch.device) -> None:
    spec = spec_of(1, 32, dtype=KvDtype.of("bf16" if dtype is torch.bfloat16 else "fp16"))
    sequences = [tuple(part.to(dtype) for part in sequence) for sequence in draw(spec, 2, [30])]
    steps: list[Step] = [[(0, 0, 29)], [(0, 29, 30)]]
    (found,) = simulate(spec, sequences, steps, plain(spec), GpuAttention(), device=device)
    assert found.dtype is dtype
    exact = tuple(part.float() for part in sequences[0])
    weighed = expected(spec, exact, plain(spec), True)
    assert ((found.float() - expected(spec, exact, plain(spec))).abs() <= 2**-7 * weighed).all()


@pytest.fixture
def many_splits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Splits of 32 keys on a GPU that is never full."""
    monkeypatch.setattr(attention, "LEAST_SPLIT", 32)
    monkeypatch.setattr(attention, "PROGRAMS", 1000)


def attend_last(
    spec: CacheSpec,
    sequences: list[Sequence],
    queries: list[int],
    parameters: Any,
    device: torch.device,
    capacity: int = 0,
) -> list[Tensor]:
    """All K and V written at once, then the last tokens of every sequence attend in one step."""
    kernel, lengths = GpuAttention(), [len(q) for q, _, _ in sequences]
    pages, count = hand_out_pages(lengths)
    cache = kernel.allocate(spec, count, 16, device)
    for buffer in cache.buffers.values():
        buffer.view(torch.uint8).fill_(0xFF)
    everything = [(owner, 0, length) for owner, length in enumerate(lengths)]
    k, v = (torch.cat([sequence[part] for sequence in sequences]).to(device) for part in (1, 2))
    kernel.write(cache, k, v, make_batch(everything, pages, device=device))
    step = [(owner, length - queries[owner], length) for owner, length in enumerate(lengths)]
    batch = make_batch(step, pages, device=device)
    batch.max_context = max(batch.max_context, capacity)
    if parameters.sinks is not None:
        parameters = replace(parameters, sinks=parameters.sinks.to(device))
    q = torch.cat([sequences[owner][0][first:] for owner, first, _ in step]).to(device)
    return list(kernel.attend(q, cache, batch, parameters).cpu().split(queries))


def assert_last_close(
    spec: CacheSpec, sequences: list[Sequence], outputs: list[Tensor], parameters: Any
) -> None:
    for sequence, found in zip(sequences, outputs, strict=True):
        wanted = expected(spec, sequence, parameters)[-len(found) :]
        allowed = tolerance(spec, sequence, wanted, parameters)[-len(found) :]
        assert ((found - wanted).abs() <= allowed).all()


@pytest.mark.parametrize("dtype", [BF16, INT8], ids=str)
def test_a_prompt_behind_a_long_context(dtype: KvDtype, device: torch.device) -> None:
    """Keys that all rows of a tile see, and those behind them."""
    spec, parameters = spec_of(1, 32, dtype=dtype), AttentionParameters(0.2, softcap=5.0)
    sequences = draw(spec, 4, [90])
    outputs = attend_last(spec, sequences, [20], parameters, device)
    assert_last_close(spec, sequences, outputs, parameters)


SPLIT: dict[str, tuple[CacheSpec, int, list[int], dict[str, Any]]] = {
    "f32 with drafts": (spec_of(1, 24, dtype=F32), 3, [3, 1, 2], {}),
    "window": (spec_of(1, 16, dtype=F32, window=50), 4, [1, 1, 1], GPT_OSS),
    "f32, more rows than a tile": (spec_of(1, 16, dtype=F32), 33, [1, 1, 1], {}),
    "latent int8": (latent_of(48, 32, INT8), 4, [1, 2, 1], GPT_OSS),
}


@pytest.mark.parametrize("case", SPLIT)
@pytest.mark.usefixtures("many_splits")
def test_splits_join(case: str, device: torch.device) -> None:
    """Contexts over several splits and shorter than one, and splits that are left empty."""
    spec, group, queries, extra = SPLIT[case]
    parameters = replace(plain(spec), **extra)
    sequences = draw(spec, group, [100, 33, 3])
    outputs = attend_last(spec, sequences, queries, parameters, device, capacity=200)
    assert_last_close(spec, sequences, outputs, parameters)


@pytest.mark.usefixtures("many_splits")
def test_a_captured_launch_stays_right_while_contexts_grow(device: torch.device) -> None:
    """The grid of a capacity of 160 tokens, on contexts of 1 to 150; the same bits every time."""
    spec, kernel = spec_of(1, 16, dtype=F32), GpuAttention()
    sequences = draw(spec, 2, [150, 40])
    pages = [list(range(10)), [12, 10, 11]]
    cache = kernel.allocate(spec, 13, 16, device)
    for buffer in cache.buffers.values():
        buffer.fill_(torch.nan)
    written = make_batch([(0, 0, 150), (1, 0, 40)], pages, device=device)
    k, v = (torch.cat([sequence[part] for sequence in sequences]).to(device) for part in (1, 2))
    kernel.write(cache, k, v, written)
    for lengths in ((1, 16), (150, 40)):
        step = [(owner, length - 1, length) for owner, length in enumerate(lengths)]
        q = torch.cat([sequences[owner][0][first:end] for owner, first, end in step]).to(device)
        batch = make_batch(step, pages, device=device)
        batch.max_context = 160
        found = kernel.attend(q, cache, batch, plain(spec))
        for row, (owner, first, _) in enumerate(step):
            wanted = expected(spec, sequences[owner], plain(spec))[first]
            assert (found[row].cpu() - wanted).abs().max() <= 2e-6 * wanted.abs().max()
    assert torch.equal(kernel.attend(q, cache, batch, plain(spec)), found)


@pytest.mark.parametrize("split", [False, True])
def test_rows_that_only_fill_a_batch(
    split: bool, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No slot: nothing is written; no context: zeros, with sinks too, and no page is read."""
    if split:
        monkeypatch.setattr(attention, "LEAST_SPLIT", 16)
    spec, kernel = spec_of(1, 16, dtype=INT8), GpuAttention()
    parameters = replace(plain(spec), sinks=torch.tensor([0.5, -1.0], device=device))
    sequence = draw(spec, 2, [41])[0]
    cache = kernel.allocate(spec, 5, 16, device)
    for buffer in cache.buffers.values():
        buffer.view(torch.uint8).fill_(0xFF)
    q, k, v = (part.to(device) for part in sequence)
    pages = [4, 0, 2]
    kernel.write(cache, k[:40], v[:40], make_batch([(0, 0, 40)], [pages], device=device))

    def int32(numbers: list) -> Tensor:
        return torch.tensor(numbers, dtype=torch.int32, device=device)

    batch = make_batch([(0, 40, 41)], [pages], device=device)
    # Another without queries stands first, and two with one query and no context behind.
    batch.query_lengths, batch.context_lengths = int32([0, 1, 1, 1]), int32([0, 41, 0, 0])
    batch.page_table = int32([[NOWHERE] * 4, [*pages, NOWHERE], [NOWHERE] * 4, [NOWHERE] * 4])
    batch.write_slots = int32([2 * 16 + 8, -1, -1])
    batch.max_context = 64
    before = {name: buffer.clone() for name, buffer in cache.buffers.items()}
    rows = torch.cat([q[40:], torch.full_like(q[:2], torch.nan)])
    kernel.write(cache, torch.cat([k[40:], k[:2]]), torch.cat([v[40:], v[:2]]), batch)
    for name, buffer in cache.buffers.items():
        changed = (buffer.view(torch.uint8) != before[name].view(torch.uint8)).flatten(1).any(1)
        assert changed.tolist() == [False, False, True, False, False]
    found = kernel.attend(rows, cache, batch, parameters).cpu()
    wanted = expected(spec, sequence, replace(parameters, sinks=parameters.sinks.cpu()))[40]
    assert (found[0] - wanted).abs().max() <= 2**-8 * wanted.abs().max()
    assert torch.equal(found[1:], torch.zeros(2, 2 * 16))


def test_shared_pages_and_pages_that_are_gone(device: torch.device) -> None:
    """Two sequences over the same first pages; entries of the table before a window are never followed."""
    spec, kernel = spec_of(1, 16, dtype=F32, window=20), GpuAttention()
    first, second = draw(spec, 2, [70, 70])
    q, k, v = (torch.cat([a[:48], b[48:]]) for a, b in zip(first, second, strict=True))
    pages = [[5, 1, 6, 0, 3], [5, 1, 6, 2, 4]]
    cache = kernel.allocate(spec, 7, 16, device)
    kernel.write(cache, *(x.to(device) for x in first[1:]), make_batch([(0, 0, 70)], pages, device=device))
    own = make_batch([(1, 48, 70)], pages, device=device)
    kernel.write(cache, k[48:].to(device), v[48:].to(device), own)
    for last in (1, 18):  # one launch of few queries, one of many
        batch = make_batch([(0, 70 - last, 70), (1, 70 - last, 70)], pages, device=device)
        batch.page_table[:, : (70 - last - 19) // 16] = NOWHERE
        found = kernel.attend(torch.cat([first[0][-last:], q[-last:]]).to(device), cache, batch, plain(spec))
        for sequence, part in zip((first, (q, k, v)), found.cpu().split(last), strict=True):
            wanted = expected(spec, sequence, plain(spec))[-last:]
            assert (part - wanted).abs().max() <= 2e-6 * wanted.abs().max()


def test_no_scale_reaches_an_earlier_token(device: torch.device) -> None:
    """A token that is no number spoils itself and what comes after it, and no other sequence."""
    spec = spec_of(1, 16, dtype=INT8)
    (q, k, v), mate = draw(spec, 2, [40, 9])
    for spoiled in (0, 1):
        both = [k.clone(), v.clone()]
        both[spoiled][30, 0, 3] = torch.nan
        bad = (q, *both)
        found = simulate(spec, [bad, mate], whole([bad, mate]), plain(spec), GpuAttention(), device=device)
        assert found[0][:30].isfinite().all() and found[1].isfinite().all()
        assert found[0][30:].isnan().all()


@pytest.mark.skipif(torch.cuda.is_available(), reason="pages that nobody touches cost memory on a GPU")
def test_caches_of_more_than_2_to_the_31_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "_zeros", lambda shape, dtype, device: sparse_zeros(shape, dtype))
    spec, kernel = spec_of(1, 256, dtype=INT8), GpuAttention()
    sequence = draw(spec, 1, [20])[0]
    count = (1 << 31) // (16 * 256) + 9
    cache = kernel.allocate(spec, count, 16, CPU)
    batch = make_batch([(0, 0, 20)], [[count - 1, count - 2]])
    q, k, v = (far_apart(part) for part in sequence)
    kernel.write(cache, k, v, batch)
    assert_close(spec, [sequence], [kernel.attend(q, cache, batch, plain(spec))], plain(spec))


def test_choice_and_refusals(device: torch.device) -> None:
    kernel = GpuAttention()
    assert choose_attention(spec_of(1, 40), device).name == "gpu"
    assert choose_attention(latent_of(576, 512, INT4), device).name == "gpu"
    assert choose_attention(spec_of(1, 640), device).name == "reference"
    assert "k_dim <= 576, got 640" in str(kernel.refuses(spec_of(1, 640), device))
    assert "v_dim 80 > k_dim 64" in str(kernel.refuses(latent_of(64, 80), device))
    assert "even head size" in str(kernel.refuses(spec_of(1, 33, dtype=INT4), device))
    assert "needs an NVIDIA GPU, got meta" in str(kernel.refuses(spec_of(1, 64), torch.device("meta")))
    for page_size in (4, 24):
        with pytest.raises(LowbitError, match=f"8, 16, 32 … tokens, got {page_size}"):
            kernel.allocate(spec_of(1, 64), 4, page_size, device)


def test_blocks_and_splits_follow_from_the_shape(device: torch.device) -> None:
    """One long sequence is split over the whole GPU, hundreds of sequences are not split."""
    h100 = attention._Device(132, 227 << 10)
    assert attention._splits(8, 100_000, h100) == 66
    assert attention._splits(256 * 8, 100_000, h100) == 1
    assert attention._splits(8, 300, h100) == 3
    assert attention._parts(576) == (512, 64) and attention._parts(80) == (64, 16)
    assert attention._parts(128) == (128, 0) and attention._parts(112) == (128, 0)
    assert attention._parts(6) == (16, 0)


def chunked_logits(
    model: Any, prompts: list[list[int]], caches: list[LayerCache], device: torch.device
) -> Tensor:
    """Logits of every token: a part of the prompts, the rest of one beside a decode, and a decode step."""
    numbers = list(range(20))
    random.Random(1).shuffle(numbers)
    pages = [[numbers.pop() for _ in range(5)] for _ in prompts]
    found = []
    for step in ([(0, 0, 20), (1, 0, 7)], [(0, 20, 42), (1, 7, 8)], [(0, 42, 43), (1, 8, 9)]):
        batch = chunk_batch([(prompts[owner][first:end], first, pages[owner]) for owner, first, end in step])
        for name, value in vars(batch).items():
            if isinstance(value, Tensor):
                setattr(batch, name, value.to(device))
        found.append(model.forward(batch, caches).float().cpu())
    return torch.cat(found)


def gpt_oss(folder: Path) -> None:
    """Windows in every other layer and a sink for each head."""
    values = {"head_dim": 16, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 13}
    saved("GptOss", folder, **SIZES | {"num_hidden_layers": 2}, **values)


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [
        ("windows and sinks", "f32"),
        ("latent", "f32"),
        pytest.param("windows and sinks", "int8", marks=pytest.mark.slow),
    ],
)
def test_models_give_the_references_logits(
    kind: str, dtype: str, tmp_path: Path, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    if kind == "latent":
        make_checkpoint("DeepseekV3 one group", tmp_path)
    else:
        gpt_oss(tmp_path)
    model = load_model(open_checkpoint(str(tmp_path)), device=str(device), kv_cache_dtype=dtype)
    specs = model.cache_specs()
    assert {choose_attention(spec, device).name for spec in specs} == {"gpu"}
    generator = torch.Generator().manual_seed(2)
    prompts = [torch.randint(3, 131, (n,), generator=generator).tolist() for n in (43, 9)]

    def logits(kernel: AttentionKernel) -> Tensor:
        return chunked_logits(
            model, prompts, [kernel.allocate(spec, 20, 16, device) for spec in specs], device
        )

    found = logits(GpuAttention())
    # Most of the time is that of other interpreted kernels: now norms, rotation and routing are torch's.
    monkeypatch.setitem(runtime._state, "interpreting", False)
    wanted = logits(ReferenceAttention())
    worst = ((found - wanted).abs().amax(1) / wanted.abs().amax(1)).max()
    assert worst <= (1e-4 if dtype == "f32" else 0.03), f"{worst:.2e}"

"""Triton's paged attention: pages as the definition stores them, results against float64 and the reference."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import forward_helpers
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
    latent_of,
    make_batch,
    plain,
    simulate,
    spec_of,
    stored,
    whole,
)
from forward_helpers import chunk_batch
from lowbit.checkpoint import open_checkpoint
from lowbit.errors import LowbitError
from lowbit.kernels.attention import CacheSpec, LayerCache, choose_attention
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
    assert scales is not None and torch.equal(cache.buffers["k_scales"].cpu().flatten(0, 2)[:20], scales[:, 0])
    assert torch.equal(cache.buffers["v"].cpu().flatten(0, 2)[:20], k[:, 0].bfloat16())


def test_every_e4m3_code_is_read_and_written(device: torch.device) -> None:
    """All bfloat16 numbers, ties among them, as torch rounds them; codes come back as values of a window of 1."""
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
    "f32, window, sinks, softcap": (spec_of(2, 16, dtype=F32, window=19), 2, GPT_OSS),
    "bf16, window of one": (spec_of(1, 32, window=1), 2, {}),
    "fp16, k 192, v 128": (spec_of(1, 192, 128, F16), 1, {}),
    "static e4m3, 96": (spec_of(1, 96, dtype=E4M3), 2, {}),
    "e4m3 of each token": (spec_of(2, 64, dtype=DYNAMIC), 1, {}),
    "e5m2, softcap": (spec_of(1, 80, dtype=E5M2), 2, {"softcap": 3.0}),
    "int8": (spec_of(2, 64, dtype=INT8), 2, {}),
    "int4": (spec_of(1, 128, dtype=INT4), 4, {}),
    "int4, 80, short groups": (spec_of(2, 80, dtype=INT4), 1, {}),
    "K int8, V int4": (spec_of(1, 96, 128, KvDtype.of("int8", "int4")), 2, {}),
    "K f32, V e4m3, sinks": (spec_of(2, 32, dtype=KvDtype.of("f32", "fp8_e4m3")), 2, GPT_OSS),
    "latent": (latent_of(576, 512), 4, {}),
    "latent f32": (latent_of(48, 32, F32), 5, {}),
    "latent with values of no power of two": (latent_of(112, 80), 3, {}),
    "latent int8": (latent_of(576, 512, INT8), 2, {}),
    "latent int8, groups of 48": (latent_of(96, 48, INT8), 2, {}),
    "latent int4": (latent_of(112, 80, INT4), 2, {}),
    "latent e4m3 that is all value": (latent_of(16, 16, DYNAMIC), 2, {}),
}
# A prompt of many tiles, its rest beside decodes (two launches), decodes with drafts and without.
LENGTHS = [1, 18, 75]
STEPS: list[Step] = [
    [(1, 0, 16), (2, 0, 20)],
    [(0, 0, 1), (1, 16, 17), (2, 20, 71)],
    [(2, 71, 74), (1, 17, 18)],
    [(2, 74, 75)],
]


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


@pytest.mark.parametrize("case", CASES)
def test_equals_float64(case: str, device: torch.device) -> None:
    spec, group, extra = CASES[case]
    if "sinks" in extra:
        extra = extra | {"sinks": extra["sinks"][: spec.heads * group]}
    parameters = replace(plain(spec), **extra)
    sequences = draw(spec, group, LENGTHS)
    outputs = simulate(spec, sequences, STEPS, parameters, GpuAttention(), device=device)
    assert_close(spec, sequences, outputs, parameters)
